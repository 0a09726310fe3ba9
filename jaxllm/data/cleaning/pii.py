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
        r"|\bsk-(?:proj|svcacct|admin|ant)-[A-Za-z0-9_-]{20,}"  # OpenAI, Anthropic
        r"|\b(?:sk|pk|rk)[-_](?:[A-Za-z0-9]{2,12}[-_]){0,4}[A-Za-z0-9]{20,}[A-Za-z0-9_-]*"  # Stripe and others
        r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}\b"
        r"|\bhf_[A-Za-z0-9]{30,}\b|\bAIza[0-9A-Za-z_-]{35}\b"
        r"|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"  # JSON web tokens
    ),
    "email": (  # but no image "icon@2x.png", no file, no product of matrices "W@x.sum(1)", no login to a host of code
        r"(?<![A-Za-z0-9._%+-])(?!git@)[._-]{0,3}[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}"
        r"@(?!\d(?:\.\d)?x\.)(?:[A-Za-z0-9-]{1,63}\.){1,8}"
        r"(?!(?:png|jpe?g|gif|svg|webp|ico|bmp|pdf|html?|css|jsx?|json|xml|txt|shape|dtype|UTF)\b)[A-Za-z]{2,24}"
        r"(?![A-Za-z0-9]|\.[A-Za-z0-9]|(?<!\.com)(?<!\.org)(?<!\.net)(?<!\.edu)(?<!\.cn)\()"
    ),
    "id": r"(?<!\d)[1-9]\d{5}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\d)",  # China
    "card": (  # of Visa, Mastercard, Discover, UnionPay, American Express, in the groups they are printed in
        r"(?<![\w-])(?<!\d\.)(?:(?:(?:4\d|5[1-5]|2[2-7]|65)\d\d|6011)([ -]?)\d{4}\1\d{4}\1\d{4}|4\d{12}|4\d{18}"
        r"|62\d\d([ -]?)\d{4}\2\d{4}\2\d{4}(?:\2\d{1,3})?|62\d{4}[ -]\d{10,13}"
        r"|3[47]\d\d([ -]?)\d{6}\3\d{5})(?!\w|[.-]\d)"
    ),
    "ip": (  # four numbers, but not of a wheel or an RPM; IPv6 of 2000::/3, where all public hosts are
        r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\w|-(?:py|cp|\d+\.(?:el|fc))\d)"
        r"|(?<![\w:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{1,4}(?!\w|:[\w:]|\.\d)"
    ),
    "phone": (  # one dot is a decimal point
        r"(?<![\w+.-])\+[1-9]\d{0,2}(?:[ -]?(?:\(\d{1,4}\)[ -]?)?\d{1,4}(?:[ -]?\d{2,4}){2,4}"
        r"|[ .-]?\d{1,4}(?:\.\d{2,4}){2,4})(?!\w|\.\d)"
        r"|(?<![\w+.-])(?:1[ .-]?)?(?:(?:\(\d{3}\) ?|\d{3}-)\d{3}|[2-9]\d\d\.[2-9]\d\d)[-.]\d{4}"
        r"(?![\w-]|\.\d)"  # North America
        r"|(?<![\w.])1[3-9]\d([ -]?)(?!0{8})\d{4}\1\d{4}(?!\w|\.\d)"  # Chinese mobile
        r"|(?<![\w.])0\d{2,3}-\d{7,8}(?!\w)"  # and landline
    ),
}
# What stands on the line before four numbers that are a version or a section, and no address.
_VERSION = re.compile(
    r"(?:(?<![A-Za-z])(?i:v|ver|(?:version|release|build|section|chapter)s?)[_\"']{0,3}[ \t]*[-.:=]?[ \t]*[\"']?"
    r"|(?:Chrom(?:e|ium)|CriOS|Edg[A-Za-z]*|OPR|Opera|Vivaldi|Browser|MicroMessenger|QQ)/"
    r"|[=<>~!^]=[ \t]*|第[ \t]*|版本号?[ \t]*[:：]?[ \t]*|§[ \t]*)\Z"
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
                text = _replace(kind, pattern, text)
        return text

    return masked


def _replace(kind: str, pattern: re.Pattern, text: str) -> str:
    """Replace what is of this kind; what looks like it and is none hides nothing that begins within."""
    parts, done, at = [], 0, 0
    while match := pattern.search(text, at):
        at = _end(kind, match)
        if at:
            parts += (text[done : match.start()], f"[{kind}]")
            done = at
        else:
            at = match.start() + 1
    return "".join((*parts, text[done:]))


def _end(kind: str, match: re.Match) -> int:
    """Return where it ends, or 0: public addresses only, long enough numbers, and a right check digit."""
    text, good = match[0], True
    if kind == "ip":
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return 0
        good = address.is_global and not address.is_multicast
        if address.version == 6:  # "x[2000::2]" is a slice
            good = good and len([group for group in text.split(":") if group]) >= 3
        else:
            good = good and not _VERSION.search(match.string[max(0, match.start() - 24) : match.start()])
    elif kind == "phone" and text[0] == "+":  # ITU-T E.164
        good = 8 <= len(re.findall(r"\d", text)) <= 15
    elif kind == "id":  # GB 11643-1999
        rest = sum(weight * int(digit) for weight, digit in zip(_CHINESE_WEIGHTS, text, strict=False)) % 11
        good = "10X98765432"[rest] == text[-1].upper()
    elif kind == "card":  # "6222 0212 3456 7894 123": with three more digits, or with the code on the back behind it
        ends = (end for end in (len(text), 19) if not text[end:].isdigit() and _luhn(text[:end]))
        return next((match.start() + end for end in ends), 0)
    return match.end() if good else 0


def _luhn(text: str) -> bool:
    """Return whether the check digit is right (ISO/IEC 7812)."""
    digits = [int(digit) for digit in text if digit.isdigit()][::-1]
    return sum(digits[::2] + [digit * 2 - 9 * (digit > 4) for digit in digits[1::2]]) % 10 == 0
