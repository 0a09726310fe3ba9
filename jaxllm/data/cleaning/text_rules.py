"""Rules that change a text: functions from text to text, each of which leaves what it has made as it is."""

import html
import re
from functools import cache
from typing import Any

from jaxllm.core.extras import extra

_NEWLINES = re.compile("\r\n?|[\x0b\x0c\x85]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_ELEMENTS = (  # not any word in angle brackets: text has "#include <stdio.h>" and "<name>" as well
    "a|abbr|address|article|aside|b|blockquote|body|br|button|caption|center|cite|code|col|dd|del|div|dl|dt|em|embed|"
    "figcaption|figure|font|footer|form|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|label|li|link|main|meta|nav|"
    "noscript|object|ol|option|p|pre|q|s|section|select|small|source|span|strike|strong|sub|sup|svg|table|tbody|td|"
    "textarea|tfoot|th|thead|time|title|tr|u|ul|video"
)
_TAG = re.compile(
    # None looks past the next of its kind: without its end, each would be read to the end of the text.
    r"<!--(?:(?!<!--).)*?-->|<!doctype[^<>]*>|<(script|style)\b[^<>]*>(?:(?!<(?:script|style)\b).)*?</\1\s*>"
    rf"|</?(?:{_ELEMENTS})(?:\s[^<>]*)?/?>",
    re.DOTALL | re.IGNORECASE,
)
_NARROW = {code: code - 0xFEE0 for code in range(0xFF10, 0xFF5B) if chr(code - 0xFEE0).isalnum()}


def remove_control(text: str) -> str:
    """Turn CR, CRLF, VT, FF and NEL into newlines and remove other control characters; tabs and U+2028 stay."""
    return _CONTROL.sub("", _NEWLINES.sub("\n", text))


def repair(text: str) -> str:
    """Mend the lines that were decoded with the wrong encoding, if they look as if they were."""
    if text.isascii():
        return text
    with extra("prep"):
        import ftfy
    fix = lambda line: line if line.isascii() or not ftfy.is_bad(line) else ftfy.fix_encoding(line)
    return "\n".join(map(fix, text.split("\n")))


def remove_tags(text: str) -> str:
    """Remove HTML tags, comments, scripts and styles, and read entities."""
    return html.unescape(_TAG.sub("", text)) if "<" in text or "&" in text else text


def narrow(text: str) -> str:
    """Turn full-width letters and digits into ASCII; punctuation and the wide space stay, which Chinese text needs."""
    return text.translate(_NARROW)


def convert(text: str, target: str) -> str:
    """Return `text` with its Chinese characters "simplified" or "traditional"."""
    return _converter(target).convert(text)


@cache
def _converter(target: str) -> Any:
    with extra("prep"):
        import opencc
    return opencc.OpenCC("t2s" if target == "simplified" else "s2t")


def strip_line_ends(text: str) -> str:
    """Remove spaces and tabs before newlines, and newlines around the text."""
    return "\n".join(line.rstrip(" \t") for line in text.split("\n")).strip("\n")
