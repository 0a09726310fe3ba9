"""Chat templates: messages to text pieces and special tokens, with the tokens to learn marked.

A template is Jinja2 as Hugging Face writes it; `{% generation %}` ... `{% endgeneration %}` surrounds what the model
must learn to say, and where a template has no such tag, that is told from what each answer adds to the text. Special
tokens come from the template alone: the text of one inside a message stays text (no prompt injection).
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import resources
from itertools import islice
from typing import TYPE_CHECKING

from jaxllm.data.documents import Message
from jaxllm.data.tokenizers.fast_pieces import FastPieces

if TYPE_CHECKING:
    from jaxllm.data.tokenizers.tokenizer import Tokenizer

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
BOS, EOS = "<bos>", "<eos>"
_TAG = re.compile(r"{%[-+]?\s*generation\b")

_ADVICE = (
    "put {% generation %} and {% endgeneration %} around what the assistant says and the token that ends it, in the "
    "chat_template.jinja of the model's directory"
)

# The answer ends with eos inside the generation block, so that the model learns to stop.
DEFAULT_TEMPLATE = resources.files(__package__).joinpath("chat_template.jinja").read_text("utf-8")

# Of tokenizers of models with an encoder, which have no template: texts, each with its end, of which the last is said.
PAIR_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}"
)


class TemplateError(ValueError):
    """The template itself does not allow to tell what the assistant says."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of rendered chat: running text, or one special token by name; `trained` = said by the assistant."""

    text: str
    special: bool
    trained: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled template and the special tokens it may print.

    Attributes:
      source: Jinja2 text; sees `messages`, `add_generation_prompt`, `bos_token`, `eos_token`, `raise_exception`.
      special: names of the special tokens; anything else the template prints is text.
    """

    source: str = DEFAULT_TEMPLATE
    special: tuple[str, ...] = (BOS, EOS, *ROLE_TOKENS)
    bos_token: str = BOS
    eos_token: str = EOS

    def render(
        self, messages: Sequence[Message | Mapping[str, str]], add_generation_prompt: bool = False
    ) -> list[Piece]:
        """Return the conversation as pieces, in order.

        Args:
          messages: `Message`s or {"role", "content"} mappings.
          add_generation_prompt: end with what precedes an answer.
        Raises:
          ValueError: the template refuses the messages (unknown role, wrong order) or itself fails; the message says
            which.
          TemplateError: it has no generation tag, and prints earlier turns or the start of an answer in two ways.
        """
        turns = [{"role": m.role, "content": m.content} if isinstance(m, Message) else dict(m) for m in messages]
        from jaxllm.data import jinja_templates

        shield, start, end = _unused_characters("".join(str(value) for turn in turns for value in turn.values()))
        # The text of special tokens inside a message is broken up: '<eos>' -> '<' shield 'eos>'.
        hide = partial(self._special_pattern.sub, lambda found: found[0][0] + shield + found[0][1:])
        guarded = [{k: hide(value) if isinstance(value, str) else value for k, value in turn.items()} for turn in turns]
        render = lambda turns, prompt: jinja_templates.render(
            self.source, messages=turns, add_generation_prompt=prompt, tools=None, documents=None,
            bos_token=self.bos_token, eos_token=self.eos_token, generation_start=start, generation_end=end,
        )  # fmt: skip
        text = render(guarded, add_generation_prompt)
        if not (add_generation_prompt or _TAG.search(self.source)):
            text = "".join(self._mark_answers(text, guarded, render, (start, end)))
        return list(self._split(text, shield, start, end))

    def _mark_answers(
        self, text: str, turns: list[dict], render: Callable[[list[dict], bool], str], marks: tuple[str, str]
    ) -> Iterator[str]:
        """Yield `text` with marks around each answer: what its message adds to the generation prompt before it.

        White space after the token that ends an answer is not part of it: nobody asks the model for more by then.
        """
        done = 0
        for number in (i for i, turn in enumerate(turns) if turn["role"] == "assistant"):
            before, through = render(turns[:number], True), render(turns[: number + 1], False)
            if not through.startswith(before) or len(before) < done:
                raise TemplateError(f"begins an answer in another way than its generation prompt; {_ADVICE}")
            if not text.startswith(through):
                advice = f"prepare conversations of one answer each, or {_ADVICE}"
                raise TemplateError(f"prints earlier turns in another way than the last (without reasoning?); {advice}")
            said = through[len(before) :]
            if said.rstrip().endswith(self.special):
                said = said.rstrip()
            yield from (text[done : len(before)], marks[0], said, marks[1])
            done = len(before) + len(said)
        yield text[done:]

    @cached_property
    def _special_pattern(self) -> re.Pattern:
        longest_first = sorted(self.special, key=len, reverse=True)
        return re.compile("|".join(re.escape(name) for name in longest_first))

    def _split(self, text: str, shield: str, start: str, end: str) -> Iterator[Piece]:
        trained = False
        for part in re.split(f"({start}|{end}|{self._special_pattern.pattern})", text):
            if part in (start, end):
                trained = part == start
            elif part in self.special:
                yield Piece(part, special=True, trained=trained)
            elif part:
                yield Piece(part.replace(shield, ""), special=False, trained=trained)


def encode_chat(
    tokenizer: "Tokenizer", messages: Sequence[Message | Mapping[str, str]], add_generation_prompt: bool = False
) -> tuple[list[int], list[bool]]:
    """Return (ids, trained) of a conversation; `trained[i]` is True where id i is part of an answer or its end.

    Example with a one-id-per-word tokenizer, messages user "hi", assistant "yo":

        ids      <bos> <|user|> hi <|assistant|> yo <eos>
        trained      0        0  0             0  1     1

    Raises:
      ValueError: the tokenizer has no chat template, or the template refuses the messages.
    """
    pieces = template_of(tokenizer).render(messages, add_generation_prompt)
    # The text of a message that spells a special token must stay text.
    spelled = any(name in piece.text for piece in pieces if not piece.special for name in tokenizer.special)
    if isinstance(tokenizer.pieces, FastPieces) and not spelled and tokenizer.chat.source != PAIR_TEMPLATE:
        # At once, as transformers does: some of these tokenizers treat the start of a text in a way of its own.
        ids, starts = tokenizer.pieces.encode_whole("".join(piece.text for piece in pieces))
        learned = [piece.trained for piece in pieces for _ in piece.text]
        return ids, [learned[start] for start in starts]
    said = [(piece.text, piece.trained) for piece in pieces if not piece.special]
    if tokenizer.pieces.kind == "texts":  # sources and targets may be of two languages
        texts = iter([tokenizer.pieces.texts.side(text, target=answer) for text, answer in said])
    else:
        texts = iter(tokenizer.encode_batch([text for text, _ in said]))
    ids: list[int] = []
    trained: list[bool] = []
    for piece in pieces:
        new = [tokenizer.special[piece.text]] if piece.special else next(texts)
        ids += new
        trained += [piece.trained] * len(new)
    return ids, trained


def template_of(tokenizer: "Tokenizer") -> ChatTemplate:
    """Return the chat template of a tokenizer.

    Raises:
      ValueError: it has none.
    """
    if tokenizer.chat is None:
        raise ValueError(
            f"this tokenizer has no chat template: its special tokens are {', '.join(tokenizer.special) or 'none'} and "
            f"the default template needs {', '.join(ROLE_TOKENS)}; train a tokenizer with jaxllm, or save one with a "
            "chat template of its own"
        )
    return tokenizer.chat


def _unused_characters(text: str) -> list[str]:
    """Three characters that `text` does not hold: from the end of Unicode, whose characters no real text uses."""
    used = set(text)
    return list(islice((each for each in map(chr, range(sys.maxunicode, 0, -1)) if each not in used), 3))
