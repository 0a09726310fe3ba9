"""Tokenizers compared on the same held-out texts, before one of them is chosen for good."""

import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxllm.data import stages
from jaxllm.data.cleaning.clean import Cleaner
from jaxllm.data.cleaning.dedup import digest
from jaxllm.data.cleaning.ngrams import units
from jaxllm.data.problems import Problems
from jaxllm.data.reading import sources
from jaxllm.data.tokenizers import tokenizer
from jaxllm.data.tokenizers.pieces_training import TokenizerConfig, sample
from jaxllm.data.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

    from jaxllm.data.prepare_config import PrepareConfig

HELD_OUT = 10  # of so many texts one is measured, the others train
MEASURED_BYTES = 5_000_000  # more would not change the numbers
SCRIPT_CHARS = 400  # of a text say which script it is in
DIGITS = "2024 1234567890"


class Density(NamedTuple):
    """What a tokenizer makes of the texts of one script.

    Attributes:
      bytes_per_token: UTF-8.
      fertility: tokens per word, or per character of a script that writes no spaces (`ngrams`).
      broken: share of the tokens that are a part of a character, such as bytes that a piece is missing for.
    """

    bytes_per_token: float
    fertility: float
    broken: float


class Measured(NamedTuple):
    """One tokenizer on the measured texts.

    Attributes:
      scripts: by script; "all" first.
      lossless: share of the texts that decoding gives back.
      single_digits: whether numbers are cut into digits.
      chat: whether it has a chat template with its tokens.
      speed: of encoding, MB/s.
    """

    name: str
    vocab_size: int
    scripts: dict[str, Density]
    lossless: float
    single_digits: bool
    chat: bool
    speed: float


def read(config: "PrepareConfig") -> Iterator[str]:
    """Yield the cleaned texts of the inputs, of conversations each message."""
    problems, cleaner, seen = Problems(config.errors), Cleaner(config.clean), set()
    read, apply = sources.documents, cleaner.document
    if config.chat:
        read, apply = sources.conversations, cleaner.conversation
    for item in filter(None, map(apply, chain.from_iterable(read(each, problems) for each in config.inputs))):
        key = digest(stages.identity(item))
        if key not in seen or not config.clean.deduplicate:
            seen.add(key)
            yield from stages.texts(item)


def candidates(specs: Sequence[str], texts: Sequence[str]) -> Iterator[tuple[str, Tokenizer]]:
    """Yield the name and the tokenizer of each "bpe:8000", "unigram:8000", "bytes", or path; trained on `texts`.

    Raises:
      ValueError: a size is no number, or smaller than the texts' alphabet.
      FileNotFoundError: no tokenizer is there.
    """
    for spec in specs:
        kind, _, size = spec.partition(":")
        if kind in ("bpe", "unigram"):
            if not size.isdecimal():
                raise ValueError(f"{spec!r} needs a vocabulary size, such as {kind}:8000")
            yield spec, tokenizer.train(texts, TokenizerConfig(algorithm=kind, vocab_size=int(size)))
        else:
            yield spec, tokenizer.byte_tokenizer() if spec == "bytes" else tokenizer.load(spec)


def compare(specs: Sequence[str], texts: Iterable[str], sample_bytes: int) -> list[Measured]:
    """Train or load the tokenizers and measure them on every tenth text of a sample, which no training sees.

    Args:
      specs: see `candidates`.
      sample_bytes: size of the sample.
    Raises:
      ValueError: there are fewer than ten texts; or see `candidates`.
    """
    kept = sample(texts, sample_bytes)
    held = sample(kept[::HELD_OUT], MEASURED_BYTES)
    if len(kept) < HELD_OUT:
        raise ValueError(f"comparing needs {HELD_OUT} documents, and there are {len(kept)}; cut finer or give more")
    training = [text for number, text in enumerate(kept) if number % HELD_OUT]
    by_script: dict[str, list[str]] = {}
    for text in held:
        by_script.setdefault(script(text), []).append(text)
    by_script = dict(sorted(by_script.items(), key=lambda entry: -len(entry[1])))
    return [measure(name, each, by_script) for name, each in candidates(specs, training)]


def measure(name: str, tok: Tokenizer, by_script: Mapping[str, Sequence[str]]) -> Measured:
    """Encode and decode the texts and count."""
    texts = list(chain.from_iterable(by_script.values()))
    tok.encode_batch(texts[:1])  # so that no first use is in the time
    start = time.perf_counter()
    ids = tok.encode_batch(texts)
    seconds = time.perf_counter() - start
    speed = sum(map(_size, texts)) / 1e6 / seconds
    same = sum(tok.decode(each) == text for each, text in zip(ids, texts, strict=True))
    pieces = [tok.token_bytes(token) for token in range(tok.vocab_size)]
    broken = np.array([piece.decode("utf-8", "ignore").encode("utf-8") != piece for piece in pieces])
    tokens = {text: np.array(each, np.int64) for text, each in zip(texts, ids, strict=True)}
    scripts = {}
    for found, each in {"all": texts, **by_script}.items():
        flat = np.concatenate([tokens[text] for text in each])
        words, count = sum(len(part.hashes) for part in units(each)), max(len(flat), 1)
        scripts[found] = Density(sum(map(_size, each)) / count, len(flat) / max(words, 1), broken[flat].sum() / count)
    single = all(sum(48 <= byte < 58 for byte in pieces[token]) <= 1 for token in tok.encode(DIGITS))
    return Measured(name, tok.vocab_size, scripts, same / len(texts), single, tok.chat is not None, speed)


def _size(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def script(text: str) -> str:
    """Return the script of most letters at the beginning of `text`, as Unicode names it; "none" without letters."""
    letters = (character for character in text[:SCRIPT_CHARS] if character.isalpha())
    found = Counter(unicodedata.name(character, "?").split(" ")[0].split("-")[0] for character in letters)
    return found.most_common(1)[0][0].capitalize().replace("Cjk", "Han") if found else "none"


def show(measured: Sequence[Measured], console: "Console") -> None:
    """Print two tables: what each tokenizer is, and how densely it writes each script."""
    from rich.markup import escape
    from rich.table import Column, Table

    facts, density = (Table(Column("tokenizer", overflow="fold")) for _ in range(2))
    for name in ("ids", "MB/s", "texts given back", "digits", "chat tokens"):
        facts.add_column(name)
    for name in ("script", "bytes per token", "tokens per word", "parts of characters"):
        density.add_column(name)
    for each in measured:
        shown, digits = escape(each.name), "one by one" if each.single_digits else "merged"
        chat = "yes" if each.chat else "no"
        facts.add_row(shown, f"{each.vocab_size:,}", f"{each.speed:.1f}", f"{each.lossless:.1%}", digits, chat)
        for script, x in each.scripts.items():
            density.add_row(shown, script, f"{x.bytes_per_token:.2f}", f"{x.fertility:.2f}", f"{x.broken:.1%}")
            shown = ""
        density.add_section()
    console.print(facts, density)
    console.print("A word of Han, Hiragana, Thai and other scripts without spaces is a character here.")
