"""What `prepare` does with one part of its input alone: from files to cleaned documents, and from these to ids.

A part is some input files that follow each other. Each stage is a task: a small value that says what is to be done, and
leaves a directory that is there whole or not at all. Any process can do it, once or again, with the same bytes. What
all parts have to say to each other (which documents are copies, which are held out) stands between the stages.
"""

import json
import os
import sys
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, compress, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from jaxtyping import Bool, UInt64
from pydantic import TypeAdapter

from jaxllm import __version__
from jaxllm.core import files
from jaxllm.data.chat import TemplateError, encode_chat
from jaxllm.data.cleaning import decontaminate
from jaxllm.data.cleaning.clean import CleanConfig, Cleaner, RuleCount
from jaxllm.data.cleaning.dedup import digest, repeated
from jaxllm.data.documents import Conversation, Document, Message, provenance
from jaxllm.data.problems import Policy, Problems
from jaxllm.data.reading import input_files, sources
from jaxllm.data.shard_writer import Encoded, Stored, chat_tokens, save_array, text_tokens
from jaxllm.data.tokenizers import tokenizer
from jaxllm.data.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jaxllm.data import repeats

BATCH_CHARS = 1 << 20  # text given to the tokenizer at once, so that it can use all cores
Tick = Callable[[int, int], None]  # called with documents and bytes that are done since the last call
T = TypeVar("T", Document, Conversation)


@dataclass
class Account:
    """What was read and what became of it; that of a later stage says by how much it changes what was kept.

    Attributes:
      inputs: of each, documents and bytes that were read, and those that were kept; totals: of all.
      languages: of each, documents and bytes that were kept.
      input: what the documents come from that are being counted.
      runs: [input, how many] of the documents that cleaning left, in their order.
    """

    problems: Problems
    rules: dict[str, RuleCount] = field(default_factory=dict)
    inputs: dict[str, list[int]] = field(default_factory=dict)
    languages: dict[str, list[int]] = field(default_factory=dict)
    input: str = ""
    runs: list[tuple[str, int]] = field(default_factory=list)

    @property
    def totals(self) -> list[int]:
        return [sum(numbers) for numbers in zip(*self.inputs.values(), strict=True)] or [0] * 4

    def read(self, item: Document | Conversation) -> int:
        """Count what was read; return its bytes."""
        size = size_of(item)
        _add(self.inputs, self.input, [1, size, 0, 0])
        return size

    def keep(self, item: Document | Conversation, sign: int = 1) -> None:
        """Count a document as kept; with `sign` -1, one that was kept as left out after all."""
        size = sign * size_of(item)
        _add(self.inputs, self.input, [0, 0, sign, size])
        if isinstance(item, Document) and item.language is not None:
            _add(self.languages, item.language, [sign, size])

    def drop(self, name: str, item: Document | Conversation) -> None:
        """Count a document that was kept as left out by the rule `name`."""
        self.keep(item, -1)
        text = identity(item)
        shown = repr(text[:60]) if isinstance(item, Document) else text[:60]
        self.rules.setdefault(name, RuleCount()).drop(item, shown)


@contextmanager
def result(out: Path) -> Iterator[Path]:
    """Give a place to write into that becomes `out` when all went well; if `out` is there by then, it is as good."""
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp") as parent:
        directory = Path(parent) / out.name
        directory.mkdir()
        yield directory
        for path in directory.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        try:
            directory.rename(out)
        except OSError:  # another process was faster
            if not out.exists():
                raise


def merge(accounts: Iterable[Account]) -> Account:
    """Return the sum of accounts, with the examples of the first."""
    total = Account(Problems())
    for each in accounts:
        total.problems += each.problems
        for mine, theirs in ((total.inputs, each.inputs), (total.languages, each.languages)):
            for name, numbers in theirs.items():
                _add(mine, name, numbers)
        for name, rule in each.rules.items():
            total.rules[name] = total.rules.get(name, RuleCount()) + rule
    return total


def _add(totals: dict[str, list[int]], name: str, numbers: list[int]) -> None:
    before = totals.setdefault(name, [0] * len(numbers))
    totals[name] = [a + b for a, b in zip(before, numbers, strict=True)]


_ACCOUNT = TypeAdapter(Account)


def _write_account(directory: Path, account: Account) -> None:
    files.write_json(directory / "account.json", _ACCOUNT.dump_python(account, mode="json"))


def read_account(directory: Path) -> Account:
    """Return the account of a finished stage."""
    return _ACCOUNT.validate_python(files.read_json(directory / "account.json"))


@dataclass(frozen=True)
class Clean:
    """Reads a part and writes its cleaned documents: documents.jsonl, digests.npy and ids.npy (of the texts and ids,
    uint64 [n, 2]; 0 for no id), account.json.

    Attributes:
      evaluation: what `decontaminate.write` wrote, or None.
    """

    out: Path
    inputs: tuple[sources.Part, ...]
    rules: CleanConfig
    chat: bool
    errors: Policy
    evaluation: Path | None = None

    @property
    def key(self) -> str:
        """What decides the result, but for the policy."""
        evaluation = self.evaluation and self.evaluation.name
        return repr((__version__, sys.version, self.inputs, self.rules, self.chat, evaluation))

    def __call__(self, tick: Tick) -> None:
        """Do it.

        Raises:
          ValueError: unreadable input under the policy "error", or a file that changed since the work began.
        """
        account, digests, ids = Account(Problems(self.errors)), bytearray(), bytearray()
        row = None
        with result(self.out) as directory:
            with open(directory / "documents.jsonl", "wb") as file:
                for item in self._cleaned(account, tick):
                    digests += digest(identity(item))
                    before, row = row, (item.source, item.location)
                    ids += digest(f"{account.input} {item.id}") if item.id and row != before else bytes(16)
                    file.write((json.dumps(item, ensure_ascii=False) + "\n").encode("utf-8"))
            save_array(directory / "ids.npy", np.frombuffer(ids, "<u8").reshape(-1, 2))
            save_array(directory / "digests.npy", np.frombuffer(digests, "<u8").reshape(-1, 2))
            _write_account(directory, account)

    def _cleaned(self, account: Account, tick: Tick) -> Iterator[Document | Conversation]:
        cleaner = Cleaner(self.rules, self.evaluation and decontaminate.read(self.evaluation))
        account.rules = cleaner.counts
        read, apply = sources.documents, cleaner.document
        if self.chat:
            read, apply = sources.conversations, cleaner.conversation
        for part in self.inputs:
            account.input, kept = sources.name_of(part.source), 0
            for item in read(part, account.problems):
                tick(1, account.read(item))
                if (cleaned := apply(item)) is not None:
                    account.keep(cleaned)
                    kept += 1
                    yield cleaned
            account.runs.append((account.input, kept))
            if part.size is not None and input_files.stamp(part.path) != (part.size, part.changed):
                raise ValueError(f"{part.path} changed while it was read; run this again when it is complete")


@dataclass(frozen=True)
class Encode:
    """Turns the kept documents of a part into ids.

    Writes tokens.bin (uint16 or uint32), for chat trained.bin (bool), origins.jsonl, account.json, and index.npy: int64
    [n + 1, 4], sums over the documents before each of tokens, bytes of origins, trained tokens and their text bytes.

    Attributes:
      text: what `Clean` left. keep: .npy, bool for each document of it.
      tokenizer: directory; named: what errors call it.
      verdicts: what else is left out, or changed.
    """

    out: Path
    text: Path
    keep: Path
    tokenizer: Path
    named: str
    chat: bool
    errors: Policy
    verdicts: "repeats.Verdicts | None" = None

    @property
    def key(self) -> str:
        """What decides the result, but for the policy."""
        more = self.verdicts and self.verdicts.key
        return repr((self.text.name, zlib.crc32(self.keep.read_bytes()), self.tokenizer.name, more))

    def __call__(self, tick: Tick) -> None:
        """Do it.

        Raises:
          ValueError: a conversation that cannot be used under the policy "error", or a chat template that fits none.
        """
        tok = _load_tokenizer(self.tokenizer)
        account = Account(Problems(self.errors))
        sizes = array("q", [0, 0, 0, 0])
        with result(self.out) as directory:
            names = ("tokens.bin", "origins.jsonl", *(["trained.bin"] if self.chat else []))
            with ExitStack() as stack:
                opened = [stack.enter_context(open(directory / name, "wb")) for name in names]
                for each in self._encoded(tok, account, tick):
                    stored = (chat_tokens if self.chat else text_tokens)(tok, each)
                    for file, content in zip(opened, (stored.tokens, stored.origins, stored.trained), strict=False):
                        file.write(content)
                    sizes.extend((len(stored.tokens), len(stored.origins), stored.n_trained, stored.text_bytes))
            save_array(directory / "index.npy", np.frombuffer(sizes, np.int64).reshape(-1, 4).cumsum(axis=0))
            _write_account(directory, account)

    def _encoded(self, tok: Tokenizer, account: Account, tick: Tick) -> Iterator[Encoded]:
        kept = self._kept(account, tick)
        for batch in batches(kept) if not self.chat else ():
            for each, ids in zip(batch, tok.encode_batch([each.text for each in batch]), strict=True):
                yield Encoded(each.source, each.location, ids, [], size_of(each), provenance(each))
        for item in kept if self.chat else ():
            try:
                ids, trained = encode_chat(tok, item.messages)
                if not any(trained[1:]):  # nothing predicts the first token
                    raise ValueError("no token of this conversation is learned; it needs an answer of the assistant")
            except TemplateError as error:  # no line of the user's is at fault
                raise ValueError(f"the chat template of {self.named} {error}") from error
            except ValueError as error:
                account.problems.report(f"{item.source}, {item.location}: {error}")
                account.keep(item, -1)
            else:
                yield Encoded(item.source, item.location, ids, trained, size_of(item), provenance(item))

    def _kept(self, account: Account, tick: Tick) -> Iterator[Document | Conversation]:
        judge = None if self.verdicts is None else self.verdicts.open()
        keep = np.load(self.keep).tolist()
        inputs = chain.from_iterable(repeat(*run) for run in read_account(self.text).runs)
        for number, (item, account.input) in enumerate(zip(read_documents(self.text, self.chat), inputs, strict=True)):
            tick(1, size_of(item))
            if not keep[number]:
                account.drop("duplicate", item)
            elif (left := item if judge is None else judge(number, item, account)) is not None:
                yield left


class EncodedPart:
    """The documents of a part that `Encode` left, by number; mapped into memory."""

    def __init__(self, directory: Path, dtype: str, chat: bool):
        self._index = np.load(directory / "index.npy", mmap_mode="r").view(np.ndarray)
        self._tokens = _map(directory / "tokens.bin", dtype)
        self._origins = _map(directory / "origins.jsonl", "uint8")
        self._trained = _map(directory / "trained.bin", "bool") if chat else None

    def stretches(self, start: int, stop: int, room: Callable[[], int]) -> Iterator[Stored]:
        """Yield the documents [start, stop) in stretches of at most `room()` tokens, or of one document."""
        while start < stop:
            limit = self._index[start, 0] + room()
            end = start + max(1, int(np.searchsorted(self._index[start + 1 : stop + 1, 0], limit, side="right")))
            (token, origin, *before), (last, origin_end, *after) = self._index[[start, end]].tolist()
            yield Stored(
                self._tokens[token:last],
                np.diff(self._index[start : end + 1, 0]),
                self._trained[token:last] if self._trained is not None else np.zeros(0, bool),
                self._origins[origin:origin_end],
                after[0] - before[0],
                after[1] - before[1],
            )
            start = end


def keep_first(digests: Sequence[UInt64[np.ndarray, "n 2"]]) -> list[Bool[np.ndarray, "n"]]:
    """Return for each document of each part whether it is the first, in the order of parts, with its digest."""
    everything = np.concatenate([np.zeros((0, 2), np.uint64), *digests])
    keep = ~repeated(everything, np.arange(len(everything)))
    return np.split(keep, np.cumsum([len(each) for each in digests])[:-1])


def batches(items: Iterable[T]) -> Iterator[list[T]]:
    """Yield documents or conversations in lists of about `BATCH_CHARS` characters."""
    batch: list[T] = []
    size = 0
    for item in items:
        batch.append(item)
        size += sum(map(len, texts(item)))
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def read_documents(
    directory: Path, chat: bool, chosen: Iterable[bool] = repeat(True)
) -> Iterator[Document | Conversation]:
    """Yield what `Clean` left in `directory`, or the `chosen` of it."""
    with open(directory / "documents.jsonl", encoding="utf-8", newline="\n") as file:
        yield from (parse(line, chat) for line in compress(file, chosen))


def parse(line: str | bytes, chat: bool) -> Document | Conversation:
    """Return what a line says that `Clean` left."""
    first, *rest = json.loads(line)
    return Conversation(tuple(Message(*each) for each in first), *rest) if chat else Document(first, *rest)


def texts(item: Document | Conversation) -> list[str]:
    """Return the texts of a document or conversation."""
    return [item.text] if isinstance(item, Document) else [message.content for message in item.messages]


def size_of(item: Document | Conversation) -> int:
    """Return the bytes of text in UTF-8."""
    return sum(len(text.encode("utf-8")) for text in texts(item))


def identity(item: Document | Conversation) -> str:
    """Return the text by which copies are recognised."""
    if isinstance(item, Document):
        return item.text
    return json.dumps([{message.role: message.content} for message in item.messages], ensure_ascii=False)


_load_tokenizer = lru_cache(maxsize=1)(tokenizer.load)


def _map(path: Path, dtype: str) -> np.ndarray:
    """A file as an array; a map of nothing is not allowed."""
    return np.memmap(path, dtype, "r").view(np.ndarray) if path.stat().st_size else np.zeros(0, dtype)
