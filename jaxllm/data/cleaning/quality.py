"""How good a text is, by numbers: heuristics of the C4, Gopher and FineWeb corpora.

The measures are those of `shape`; `QualityConfig` gives the bounds.

Sources: Raffel et al. 2020 (C4, section 2.2); Rae et al. 2021 (Gopher, section A1.1 and table A1); Penedo et al. 2024
(FineWeb, section 3.5).
"""

from functools import cached_property

from pydantic import Field

from jaxllm.core.config import Config
from jaxllm.data.cleaning.shape import END, MEASURES, UNIT, Shape, n_words

_PAGE = (
    "javascript", "terms of use", "privacy policy", "cookie policy", "use cookies", "uses cookies", "use of cookies",
    "all rights reserved", "隐私政策", "使用条款", "版权所有", "保留所有权利",
)  # fmt: skip
_GOPHER = {
    "min_words": 50, "max_words": 100_000, "min_word_length": 3, "max_word_length": 10, "max_symbols": 0.1,
    "max_bullet_lines": 0.9, "max_ellipsis_lines": 0.3, "min_alphabetic": 0.8, "min_stop_words": 2,
    "max_repeated_lines": 0.3, "max_repeated_line_bytes": 0.2, "max_repeated_paragraphs": 0.3,
    "max_repeated_paragraph_bytes": 0.2, "max_top_ngram": (0.20, 0.18, 0.16),
    "max_repeated_ngrams": (0.15, 0.14, 0.13, 0.12, 0.11, 0.10),
}  # fmt: skip
_C4 = {"min_sentences": 5, "max_braces": 0, "max_lorem_ipsum": 0}
_FINEWEB = {"min_ended_lines": 0.12, "max_short_lines": 0.67, "max_repeated_line_bytes": 0.1}
# FineWeb took Gopher's rules and those of C4 but the one about line ends, and added its own.
PRESETS = {
    "c4": {"lines": {"end_mark": True, "min_words": 3, "page_parts": True}, "quality": _C4},
    "gopher": {"quality": _GOPHER},
    "fineweb": {"lines": {"min_words": 3, "page_parts": True}, "quality": _GOPHER | _C4 | _FINEWEB},
}


class LineConfig(Config):
    """Which lines are cut out of a text; paragraphs must be lines of their own."""

    end_mark: bool = Field(False, description="lines that do not end like a sentence (C4)")
    min_words: int | None = Field(None, ge=1, description="lines of fewer words (C4: 3)")
    page_parts: bool = Field(False, description="lines about cookies, javascript, policies, copyright (C4)")
    repeated: bool = Field(False, description="a line that the text has had before, if it has at least 20 bytes")

    @property
    def any(self) -> bool:
        """Whether there is anything to do."""
        return self.end_mark or self.page_parts or self.repeated or self.min_words is not None


def keep_lines(text: str, config: LineConfig) -> str:
    """Return `text` without the lines that `config` names; what is empty after it is dropped by `min_chars`."""
    seen: set[str] = set()
    if config.page_parts and not _has_page_part(text):
        config = config.model_copy(update={"page_parts": False})
    return "\n".join(line for line in text.split("\n") if not line.strip() or _stays(line.strip(), config, seen))


def _has_page_part(text: str) -> bool:
    text = text.lower()
    return any(part in text for part in _PAGE)


def _has_words(line: str, number: int) -> bool:
    start = line[: 16 * number]  # enough for most lines, and a word that is cut is one all the same
    return n_words(UNIT.findall(start)) >= number or (start != line and n_words(UNIT.findall(line)) >= number)


def _stays(line: str, config: LineConfig, seen: set[str]) -> bool:
    if config.end_mark and not line.endswith(END):
        return False
    if config.min_words is not None and not _has_words(line, config.min_words):
        return False
    if config.page_parts and _has_page_part(line):
        return False
    if config.repeated and len(line.encode("utf-8", "surrogatepass")) >= 20:
        if line in seen:
            return False
        seen.add(line)
    return True


Bound = float | None


class QualityConfig(Config):
    """Bounds of what a text must measure to stay; none = not measured. `preset` fills those of a published corpus."""

    min_words: Bound = Field(None, ge=0, description="words (Gopher: 50)")
    max_words: Bound = Field(None, ge=0, description="words (Gopher: 100,000)")
    min_word_length: Bound = Field(None, ge=0, description="mean letters of a word, spaced scripts (Gopher: 3)")
    max_word_length: Bound = Field(None, ge=0, description="mean letters of a word, spaced scripts (Gopher: 10)")
    max_symbols: Bound = Field(None, ge=0, description="# and ellipses per word (Gopher: 0.1)")
    max_bullet_lines: Bound = Field(None, ge=0, description="share of lines that begin with a bullet (Gopher: 0.9)")
    max_ellipsis_lines: Bound = Field(None, ge=0, description="share of lines that end with an ellipsis (Gopher: 0.3)")
    min_alphabetic: Bound = Field(None, ge=0, description="share of words with a letter (Gopher: 0.8)")
    min_stop_words: Bound = Field(
        None, ge=0, description="different ones of the commonest words, English and Chinese texts (Gopher: 2)"
    )
    min_sentences: Bound = Field(None, ge=0, description="sentences (C4: 5)")
    max_braces: Bound = Field(None, ge=0, description="curly braces (C4: 0)")
    max_lorem_ipsum: Bound = Field(None, ge=0, description='places with "lorem ipsum" (C4: 0)')
    min_ended_lines: Bound = Field(None, ge=0, description="share of lines that end like a sentence (FineWeb: 0.12)")
    max_short_lines: Bound = Field(None, ge=0, description="share of lines under 30 bytes (FineWeb: 0.67)")
    max_repeated_lines: Bound = Field(None, ge=0, description="share of lines seen before (Gopher: 0.3)")
    max_repeated_line_bytes: Bound = Field(
        None, ge=0, description="their share of the text (Gopher: 0.2, FineWeb: 0.1)"
    )
    max_repeated_paragraphs: Bound = Field(None, ge=0, description="share of paragraphs seen before (Gopher: 0.3)")
    max_repeated_paragraph_bytes: Bound = Field(None, ge=0, description="their share of the text (Gopher: 0.2)")
    max_top_ngram: tuple[float, ...] = Field(
        (), description="share of the text in its commonest 2-, 3-, 4-gram (Gopher: 0.20, 0.18, 0.16)"
    )
    max_repeated_ngrams: tuple[float, ...] = Field(
        (), description="share of the text in repeated 5- ... 10-grams (Gopher: 0.15, 0.14, 0.13, 0.12, 0.11, 0.10)"
    )

    def failed(self, text: str, language: str | None = None) -> tuple[str, float] | None:
        """Return (name, value) of the first measure that is out of its bounds, or None."""
        shape = Shape(text, language)
        for name, bound in self.bounds:
            kind, _, measure = name.partition("_")
            value = MEASURES[measure](shape)
            if value is not None and (value < bound if kind == "min" else value > bound):
                return name, value
        for words, bound in enumerate(self.max_top_ngram, start=2):
            if (value := shape.top_ngram(shape.ngram(words))) > bound:
                return "max_top_ngram", value
        for words, bound in enumerate(self.max_repeated_ngrams, start=5):
            if (value := shape.repeated_ngrams(shape.ngram(words))) > bound:
                return "max_repeated_ngrams", value
            if value <= min(self.max_repeated_ngrams):  # longer ones cover less
                break
        return None

    @cached_property
    def names(self) -> list[str]:
        """What is measured."""
        return [name for name, value in self if value not in (None, ())]

    @cached_property
    def bounds(self) -> list[tuple[str, float]]:
        """(name, bound) of the single measures that are asked for, cheap ones first, as they stand above."""
        return [(name, value) for name, value in self if isinstance(value, int | float)]
