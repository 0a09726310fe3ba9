"""From sources to a dataset directory: read, clean, drop copies, tokenise, split, write; all of it streaming."""

import hashlib
import heapq
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field

from jaxllm.core import files
from jaxllm.core.config import Config
from jaxllm.core.wording import count
from jaxllm.data import sources, tokenizer
from jaxllm.data.chat import TemplateError, encode_chat, template_of
from jaxllm.data.clean import CleanConfig, Cleaner
from jaxllm.data.documents import Conversation, Document, provenance
from jaxllm.data.packing import PackingConfig, plan
from jaxllm.data.pieces_training import TokenizerConfig
from jaxllm.data.problems import Policy, Problems
from jaxllm.data.report import PackingReport, PrepareReport, Progress, SplitReport
from jaxllm.data.shard_writer import NOTHING, DatasetWriter, check_out
from jaxllm.data.shards import SPLITS, Dataset, Kind
from jaxllm.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

BYTES_PER_ID = 100  # text for each id of a vocabulary: about 25 tokens, of which the rarer half of the ids gets few
BATCH_CHARS = 1 << 20  # text given to the tokenizer at once, so that it can use all cores


class BytesTokenizer(Config):
    """One id per byte."""

    kind: Literal["bytes"] = "bytes"


class ExistingTokenizer(Config):
    """A tokenizer that exists: what a model was trained with, above all."""

    kind: Literal["existing"] = "existing"
    path: str = Field(description="tokenizer directory, dataset or run that holds one, or SentencePiece .model file")


class PrepareConfig(Config):
    """Everything `prepare` needs."""

    inputs: tuple[sources.Input, ...] = Field(min_length=1, description="where the text comes from, in this order")
    out: str = Field(description="dataset directory to make")
    chat: bool = Field(False, description="read conversations and learn the assistant's answers only, not every token")
    tokenizer: Annotated[TokenizerConfig | BytesTokenizer | ExistingTokenizer, Field(discriminator="kind")] = Field(
        TokenizerConfig(), description="how text becomes ids"
    )
    clean: CleanConfig = Field(CleanConfig(), description="rules that change or drop documents")
    validation: float = Field(0.01, ge=0, description="documents to hold out: a share if below 1, else a number")
    seed: int = Field(0, ge=0, description="decides which documents are held out")
    errors: Policy = Field(
        "error", description="unreadable input: stop, skip it, or replace bad bytes; skipped input is counted"
    )
    seq_len: int = Field(
        512, ge=2, description="row length for which the report gives the padding; training may use another"
    )
    overwrite: bool = Field(False, description="replace the dataset if it exists, once the new one is complete")

    @property
    def dataset_kind(self) -> Kind:
        return "chat" if self.chat else "text"


class Encoded(NamedTuple):
    """A document or conversation as ids; `trained` is empty for text; `size_bytes` of UTF-8 text."""

    source: str
    location: str
    ids: list[int]
    trained: list[bool]
    size_bytes: int
    more: Mapping[str, str | int] = NOTHING  # as `documents.provenance`


class Reader:
    """The cleaned documents of a config, and the account of what was read and dropped."""

    def __init__(self, config: PrepareConfig, progress: Progress):
        self.config, self.progress = config, progress
        self.problems = Problems(config.errors)
        self.cleaner = Cleaner(config.clean)
        self.n_read = self.n_kept = self.bytes_read = self.bytes_kept = 0

    def __iter__(self) -> Iterator[Document | Conversation]:
        read = sources.conversations if self.config.chat else sources.documents
        clean = self.cleaner.conversation if self.config.chat else self.cleaner.document
        for each in self.config.inputs:
            for item in read(each, self.problems):
                self.n_read += 1
                self.bytes_read += _size(item)
                self.progress(self.n_read, self.bytes_read)
                cleaned = clean(item)
                if cleaned is not None:
                    self.n_kept += 1
                    self.bytes_kept += _size(cleaned)
                    yield cleaned

    def reject(self, item: Conversation, why: ValueError) -> None:
        """Report a conversation that was yielded and cannot be used; it is not kept after all."""
        self.problems.report(f"{item.source}, {item.location}: {why}")
        self.n_kept -= 1
        self.bytes_kept -= _size(item)


def prepare(config: PrepareConfig, console: "Console | None" = None) -> PrepareReport:
    """Make the dataset directory `config.out` and return the account of it (also stored as report.json).

    Args:
      console: where the progress is shown.
    Raises:
      FileNotFoundError: a source or tokenizer does not exist.
      FileExistsError: `out` exists and `overwrite` is False, or it is no dataset, or holds an input.
      ValueError: unreadable input under the policy "error", no text, or a tokenizer that cannot be trained or has no
        chat tokens.
      OSError: the disk is full; nothing is left behind.
    """
    start = time.perf_counter()
    inputs = (path for each in config.inputs for path in sources.paths(each))
    check_out(config.out, config.overwrite, inputs)  # before a tokenizer is trained
    with Progress(console) as progress:
        writer = DatasetWriter(config.out, make_tokenizer(config, progress), config.dataset_kind, config.overwrite)
        return _write(Reader(config, progress), writer, start)


def _write(reader: Reader, writer: DatasetWriter, start: float) -> PrepareReport:
    """Fill the dataset and publish it; `start` of all the work, in seconds."""
    config = reader.config
    if config.chat:
        template_of(writer.tokenizer)  # without one, every conversation would be a problem of its own
    reader.progress.begin("reading and tokenising")
    with writer:
        for split, item in assign_splits(_encode(reader, writer.tokenizer), config.validation, config.seed):
            if config.chat:
                writer.add_chat(split, item.ids, item.trained, item.source, item.location, item.more)
            else:
                writer.add_text(split, item.ids, item.source, item.location, item.size_bytes, item.more)
        if not reader.n_kept:
            raise ValueError(_why_empty(reader))
        directory = writer.seal()
        datasets = {split: Dataset.open(directory, split, verify=False) for split in SPLITS}
        report = _report(reader, writer.tokenizer, datasets, start)
        files.write_json(directory / "report.json", report.model_dump(mode="json"))
    return report


def make_tokenizer(config: PrepareConfig, progress: Progress) -> Tokenizer:
    """Train, load or build the tokenizer that `config` asks for."""
    match config.tokenizer:
        case TokenizerConfig():
            reader = Reader(config, progress)
            texts = _told(reader)
            first = next(texts, None)
            if first is None:
                raise ValueError(_why_empty(reader))
            return tokenizer.train(chain([first], texts), config.tokenizer)
        case BytesTokenizer():
            return tokenizer.byte_tokenizer()
        case ExistingTokenizer():
            return tokenizer.load(config.tokenizer.path)


def _told(reader: Reader) -> Iterator[str]:
    """The texts of `reader`, and when they end, word that training begins."""
    reader.progress.begin("reading for the tokenizer")
    for item in reader:
        yield from _texts(item)
    reader.progress.begin("training the tokenizer")


def assign_splits(items: Iterable[Encoded], validation: float, seed: int) -> Iterator[tuple[str, Encoded]]:
    """Yield (split, item), deciding by a hash of the seed and the item's number.

    Args:
      validation: below 1, each item but the first is held out with this probability; from 1 on, exactly so many items
        are, spread evenly (a bottom-k sample: it keeps them in memory until the end).
    """
    held: list[tuple[float, int, Encoded]] = []  # a heap whose top has the largest key
    for number, item in enumerate(items):
        digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little") / 2**64
        if validation < 1:
            yield "validation" if key < validation and number else "train", item
            continue
        heapq.heappush(held, (-key, number, item))
        if len(held) > validation:
            yield "train", heapq.heappop(held)[2]
    for _, _, item in sorted(held, key=lambda entry: entry[1]):
        yield "validation", item


def _encode(reader: Reader, tok: Tokenizer) -> Iterator[Encoded]:
    batch: list[Document] = []
    size = 0
    for item in chain(reader, [None]):
        if isinstance(item, Conversation):
            try:
                ids, trained = _encode_conversation(item, tok)
            except TemplateError as error:  # no line of the user's is at fault
                raise ValueError(f"the chat template of {reader.config.tokenizer.path} {error}") from error
            except ValueError as error:
                reader.reject(item, error)
            else:
                yield Encoded(item.source, item.location, ids, trained, _size(item), provenance(item))
            continue
        if item is not None:
            batch.append(item)
            size += len(item.text)
        if item is None or size >= BATCH_CHARS:
            for each, ids in zip(batch, tok.encode_batch([each.text for each in batch]), strict=True):
                yield Encoded(each.source, each.location, ids, [], _size(each), provenance(each))
            batch, size = [], 0


def _encode_conversation(item: Conversation, tok: Tokenizer) -> tuple[list[int], list[bool]]:
    """Encode; a conversation of which nothing is learned is an error (nothing predicts the first token)."""
    ids, trained = encode_chat(tok, item.messages)
    if not any(trained[1:]):
        raise ValueError("no token of this conversation is learned; it needs an answer of the assistant")
    return ids, trained


def _texts(item: Document | Conversation) -> list[str]:
    return [item.text] if isinstance(item, Document) else [message.content for message in item.messages]


def _size(item: Document | Conversation) -> int:
    return sum(len(text.encode("utf-8")) for text in _texts(item))


def _why_empty(reader: Reader) -> str:
    problems, counts = reader.problems, reader.cleaner.counts.items()
    dropped = ", ".join(f"{name} dropped {rule.dropped}" for name, rule in counts if rule.dropped)
    first = f" (first: {problems.examples[0]})" if problems.count else ""
    return (
        f"no text is left: {count(reader.n_read, 'document')} read, {count(problems.count, 'input')} unreadable"
        f"{first}, {dropped or 'no rule dropped any'}; check the sources"
    )


def _report(reader: Reader, tok: Tokenizer, datasets: dict[str, Dataset], start: float) -> PrepareReport:
    config, asked = reader.config, reader.config.tokenizer
    found = asked.path if isinstance(asked, ExistingTokenizer) else asked.kind
    rows = plan(datasets["train"], PackingConfig(seq_len=config.seq_len, long="drop"))
    return PrepareReport(
        directory=config.out, kind=config.dataset_kind,
        documents_read=reader.n_read, documents_kept=reader.n_kept,
        bytes_read=reader.bytes_read, bytes_kept=reader.bytes_kept,
        problems=reader.problems.count, problem_examples=tuple(reader.problems.examples),
        rules=reader.cleaner.counts,
        tokenizer=asked.algorithm if isinstance(asked, TokenizerConfig) else found,
        vocab_size=tok.vocab_size, bytes_per_token=datasets["train"].bytes_per_token,
        splits={
            split: SplitReport(documents=len(each), tokens=int(each.starts[-1]), trained=each.n_trained)
            for split, each in datasets.items()
        },
        packing=PackingReport(seq_len=config.seq_len, rows=len(rows), waste=rows.waste, dropped=rows.dropped),
        seconds=time.perf_counter() - start,
        notes=tuple(_notes(reader, tok, len(datasets["train"]), len(datasets["validation"]))),
    )  # fmt: skip


def _notes(reader: Reader, tok: Tokenizer, n_train: int, n_validation: int) -> Iterator[str]:
    yield from (text if n == 1 else f"{text} ({n} times)" for text, n in reader.problems.notes.items())
    asked, size = reader.config.tokenizer, tok.vocab_size
    if isinstance(asked, TokenizerConfig):
        alphabet = len(tok.special) + 256 + sum(len(piece) == 1 for piece in tok.pieces.scored()[0])  # the least
        enough = 100 * max(-(-alphabet // 100), reader.bytes_kept // BYTES_PER_ID // 100)
        if size < asked.vocab_size:
            yield f"the text has pieces for a vocabulary of {size} only, not of {asked.vocab_size}"
        elif size > enough:
            yield (
                f"a vocabulary of {size:,} is large for {count(reader.bytes_kept, 'byte')} of text: most ids are too "
                f"rare to be learned; use --vocab-size {enough} or more text"
            )
    if reader.config.validation and not n_validation:
        finer = "cut finer (--split paragraph)"
        yield (
            f"no document is held out: there are {n_train}; {finer} or use --validation 1"
            if n_train > 1
            else f"no document is held out: there is only 1, so training has no validation loss; {finer} to get one"
        )
