"""Cleaning: small named rules over one text, and the count of what each of them changed and dropped.

A rule is a name and a pure function from text to text; what it returns else drops the document.
"""

import unicodedata
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from jaxllm.core.config import Config, merge
from jaxllm.data.cleaning.language import check_code, identify
from jaxllm.data.cleaning.pii import Kind, mask
from jaxllm.data.cleaning.quality import PRESETS, LineConfig, QualityConfig, keep_lines
from jaxllm.data.cleaning.text_rules import convert, narrow, remove_control, remove_tags, repair, strip_line_ends
from jaxllm.data.documents import Conversation, Document, Message

if TYPE_CHECKING:
    from jaxllm.data.cleaning.decontaminate import Evaluation

N_EXAMPLES = 3
_RUNNING_TEXT = {"lines", "tags"}  # rules that are not for what people say to each other
_LETTERS = {"repair", "nfc", "control", "tags", "width", "chinese"}  # rules that decide how a text is written


class CleanConfig(Config):
    """Which rules run, in this order."""

    preset: Literal["c4", "gopher", "fineweb"] | None = Field(
        None, description="lines and quality as in this corpus, where they are not given"
    )
    repair: bool = Field(False, description="mend text that was decoded with the wrong encoding")
    nfc: bool = Field(False, description="compose characters (Unicode NFC); changes no meaning, but is not reversible")
    control: bool = Field(True, description="remove control characters; form feed, foreign line ends become newlines")
    tags: bool = Field(False, description="remove what is left of HTML: tags, comments, entities")
    width: bool = Field(False, description="full-width letters and digits become ASCII; Chinese punctuation stays")
    chinese: Literal["keep", "simplified", "traditional"] = Field("keep", description="convert Chinese characters")
    lines: LineConfig = Field(LineConfig(), description="lines to cut out of documents")
    trailing_space: bool = Field(True, description="remove spaces at line ends and blank lines around a text")
    min_chars: int = Field(1, ge=1, description="drop texts shorter than this (characters)")
    pii: tuple[Kind, ...] = Field(
        (), description="personal data to mask: email, phone, ip (public), key, id (China), card"
    )
    languages: tuple[Annotated[str, AfterValidator(check_code)], ...] = Field(
        (), description="keep documents in these languages only: en, zh, ...; any = all, but know which"
    )
    language_score: float = Field(0.65, ge=0, le=1, description="least probability of the language (FineWeb: 0.65)")
    quality: QualityConfig = Field(QualityConfig(), description="bounds of what a document must measure")
    deduplicate: bool = Field(True, description="drop exact copies of an earlier document or conversation")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset") not in PRESETS:
            return values
        given = {
            key: value.model_dump(exclude_unset=True) if isinstance(value, Config) else value
            for key, value in values.items()
        }
        return merge(PRESETS[values["preset"]], given)


# Returns the text, changed or not; None to drop the document, or why it is dropped.
Rule = Callable[[str], str | tuple[str, ...] | None]


@dataclass
class RuleCount:
    """What one rule did; `examples` of what it dropped: place and beginning of the text."""

    changed: int = 0
    dropped: int = 0
    examples: list[str] = field(default_factory=list)

    def __add__(self, other: "RuleCount") -> "RuleCount":
        examples = [*self.examples, *other.examples][:N_EXAMPLES]
        return RuleCount(self.changed + other.changed, self.dropped + other.dropped, examples)

    def drop(self, item: Document | Conversation, shown: str) -> None:
        """Count a document that the rule dropped; `shown`: why, and how it begins."""
        self.dropped += 1
        if len(self.examples) < N_EXAMPLES:
            self.examples.append(f"{item.source}, {item.location}: {shown}")


def rules(config: CleanConfig, evaluation: "Evaluation | None" = None) -> dict[str, Rule]:
    """Return the rules that `config` asks for, in order; copies are dropped where all documents are known.

    Args:
      evaluation: texts to keep out. They are looked for before lines go, without which they might not be known again.
    """
    known: dict[str, tuple[bool, Rule]] = {
        "repair": (config.repair, repair),  # first: the characters that it mends include control characters
        "nfc": (config.nfc, partial(unicodedata.normalize, "NFC")),
        "control": (config.control, remove_control),
        "tags": (config.tags, remove_tags),
        "width": (config.width, narrow),
        "chinese": (config.chinese != "keep", partial(convert, target=config.chinese)),
        "contaminated": (evaluation is not None, evaluation and evaluation.leave),
        "lines": (config.lines.any, partial(keep_lines, config=config.lines)),
        "trailing_space": (config.trailing_space, strip_line_ends),
        "min_chars": (True, lambda text: text if len(text.strip()) >= config.min_chars else None),
        "pii": (bool(config.pii), mask(config.pii)),
    }
    return {name: rule for name, (wanted, rule) in known.items() if wanted}


def rewrite(text: str, config: CleanConfig, *, chat: bool) -> str:
    """Return `text` written as documents, or messages, are when they are compared with evaluation texts."""
    names = _LETTERS - _RUNNING_TEXT if chat else _LETTERS
    for rule in (rule for name, rule in rules(config).items() if name in names):
        text = rule(text)
    return text


class Cleaner:
    """Applies the rules to a stream of documents and counts.

    Attributes:
      counts: by rule name, in order.
    """

    def __init__(self, config: CleanConfig, evaluation: "Evaluation | None" = None):
        self._config, self._rules = config, rules(config, evaluation)
        names = [*self._rules, *["language"] * bool(config.languages), *config.quality.names]
        self.counts = {name: RuleCount() for name in names}

    def document(self, document: Document) -> Document | None:
        """Return the cleaned document, or None if a rule dropped it."""
        text = self._text(document.text, document)
        if text is None:
            return None
        shown, config = repr(text[:60]), self._config
        if config.languages:
            language, score = identify(text)
            known = language in config.languages and score >= config.language_score
            if not known and "any" not in config.languages:
                self.counts["language"].drop(document, f"{language or 'none'} {score:.2f}: {shown}")
                return None
            document = document._replace(language=language)
        if failed := config.quality.failed(text, document.language):
            name, value = failed
            self.counts[name].drop(document, f"{value:.3g}: {shown}")
            return None
        return document._replace(text=text)

    def conversation(self, conversation: Conversation) -> Conversation | None:
        """Return the conversation with every message cleaned, or None if a rule dropped one of them or all of it.

        Lines, languages and quality are measures of running text and are not applied; nor are tags removed, which an
        answer may be about.
        An empty system message says nothing and is left out; many data sets have one in each row.
        """
        messages = []
        for message in conversation.messages:
            if message.role == "system" and not message.content.strip():
                continue
            content = self._text(message.content, conversation, but=_RUNNING_TEXT)
            if content is None:
                return None
            messages.append(Message(message.role, content))
        return conversation._replace(messages=tuple(messages))

    def _text(self, text: str, owner: Document | Conversation, but: Collection[str] = ()) -> str | None:
        given = text
        for name, rule in self._rules.items():
            if name in but:
                continue
            result = rule(text)
            if not isinstance(result, str):
                shown = text if text.strip() else given  # a rule before may have left nothing
                self.counts[name].drop(owner, ": ".join([*(result or ()), repr(shown[:60])]))
                return None
            self.counts[name].changed += result != text
            text = result
        return text
