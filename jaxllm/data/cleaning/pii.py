"""Personal data: e-mail and IP addresses, telephone, identity and card numbers, and keys become placeholders.

Patterns find most of them and some that are none; no pattern finds names. What is masked stays readable: "[email]".
"""

import ipaddress
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

Kind = Literal["email", "phone", "ip", "key", "id", "card"]

_PATTERNS = {
    "key": (
        r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----(?:"
        r"(?:(?!-----BEGIN)[\s\S]){0,15000}?-----END [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
        r"|(?:(?:\s|\\[nr]){0,4}[A-Za-z0-9+/=]{16,})+)"  # or its end is not there
        r"|\b(?:sk|pk|rk)[-_](?:[A-Za-z0-9]{2,12}[-_]){0,4}[A-Za-z0-9]{20,}\b"  # OpenAI, Anthropic, Stripe
        r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}\b"
        r"|\bhf_[A-Za-z0-9]{30,}\b|\bAIza[0-9A-Za-z_-]{35}\b"
        r"|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"  # JSON web tokens
    ),
    "email": (
        r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}"
        r"@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9])"
    ),
    "id": r"(?<!\d)[1-9]\d{5}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\d)",  # China
    "card": r"(?<![\w.-])(?:[2-6]\d{3}(?:[ -]?\d{4}){2}[ -]?\d{3,4}|3[47]\d{2}[ -]?\d{6}[ -]?\d{5})(?![\w-])",
    "ip": (
        r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]\w)(?!\w)"
        r"|(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:.])"
    ),
    "phone": (
        r"(?<![\w+.-])\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}(?![\w-])"
        r"|(?<![\w+.-])(?:1[ .-]?)?(?:\(\d{3}\) ?|\d{3}[-.])\d{3}[-.]\d{4}(?![\w-])"  # North America
        r"|(?<![\w.])1[3-9]\d([ -]?)\d{4}\1\d{4}(?![\w]|\.\d)"  # Chinese mobile
        r"|(?<![\w.])0\d{2,3}-\d{7,8}(?!\w)"  # and landline
    ),
}
# What stands before four numbers that are a version or a section, and no address.
_VERSION = re.compile(
    r"(?:\b(?:v|ver|version|release|build|update|firmware|driver|sdk|section|chapter|clause|sec|ch)s?[.:]?\s*"
    r"|[A-Za-z]/|[A-Za-z]-|[=<>~!^]=\s*|第\s*|版本?\s*[:：]?\s*|§\s*)$",
    re.IGNORECASE,
)
# What a text with one of these has in any case; a set of characters at its start makes it quick to look for.
_SIGNS = {
    "key": "PRIVATE KEY|sk[-_]|pk[-_]|rk[-_]|AKIA|ASIA|gh[pousr]_|xox[abprs]-|hf_|AIza|eyJ",
    "email": "@",
    "id": r"[1-9]\d{16}",
    "card": r"\d{4}[ -]?\d{4}[ -]?\d{2}",
    "ip": r"[.:][0-9A-Fa-f]{0,4}[.:]",
    "phone": r"\d(?:[ ().-]{0,2}\d){5}",
}
_CHINESE_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def mask(kinds: Sequence[Kind]) -> Callable[[str], str]:
    """Return the function that replaces these kinds in a text, in a fixed order: keys first, phone numbers last.

    ASCII decides what a word is, so that "电话13812345678" ends where its Chinese ends.
    """
    compiled = partial(re.compile, flags=re.ASCII)
    found = [(kind, compiled(_SIGNS[kind]), compiled(_PATTERNS[kind])) for kind in _PATTERNS if kind in kinds]

    def masked(text: str) -> str:
        for kind, sign, pattern in found:
            if sign.search(text):
                text = pattern.sub(lambda match, kind=kind: f"[{kind}]" if _is(kind, match) else match[0], text)
        return text

    return masked


def _is(kind: str, match: re.Match) -> bool:
    """Look closer where a pattern finds too much: public addresses, and numbers whose check digit is right."""
    text = match[0]
    if kind == "ip":
        try:
            public = ipaddress.ip_address(text).is_global
        except ValueError:
            return False
        return public and not _VERSION.search(match.string[max(0, match.start() - 16) : match.start()])
    if kind == "id":  # GB 11643-1999
        rest = sum(weight * int(digit) for weight, digit in zip(_CHINESE_WEIGHTS, text, strict=False)) % 11
        return "10X98765432"[rest] == text[-1].upper()
    if kind == "card":  # Luhn's check digit, ISO/IEC 7812
        digits = [int(digit) for digit in text if digit.isdigit()][::-1]
        return sum(digits[::2] + [digit * 2 - 9 * (digit > 4) for digit in digits[1::2]]) % 10 == 0
    return True
