"""From sources to a dataset directory: read, clean, drop copies, tokenise, split, write; part by part, resumable."""

import hashlib
import heapq
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from jaxllm import __version__
from jaxllm.core import config as configs
from jaxllm.core import files
from jaxllm.core.bucket import here
from jaxllm.core.wording import count
from jaxllm.data import beam, engine, report, stages
from jaxllm.data.beam import BeamEngine
from jaxllm.data.chat import template_of
from jaxllm.data.cleaning import decontaminate
from jaxllm.data.cleaning.clean import rewrite
from jaxllm.data.engine import Work
from jaxllm.data.packing import PackingConfig, plan
from jaxllm.data.prepare_config import ExistingTokenizer, PrepareConfig
from jaxllm.data.reading import sources
from jaxllm.data.repeats import Sign, Texts, Verdicts, decide, near_duplicates, repeated_ids
from jaxllm.data.shard_writer import DatasetWriter, check_out, save_array, token_dtype
from jaxllm.data.shards import SPLITS, Dataset
from jaxllm.data.stages import Account, Clean, Encode, EncodedPart
from jaxllm.data.tokenizers import tokenizer
from jaxllm.data.tokenizers.pieces_training import TokenizerConfig
from jaxllm.data.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

BYTES_PER_ID = 100  # text for each id of a vocabulary: about 25 tokens, of which the rarer half of the ids gets few
LEAST_BYTES, ENOUGH_PARTS = 1 << 22, 64  # of a part that is worth a worker's start; for any number of cores
FLOW = "documents_read", "bytes_read", "documents_kept", "bytes_kept"  # as Account counts them
SAMPLES = 8  # the tokenizer's sample is drawn from at most about this many times its size
T = TypeVar("T")


def prepare(config: PrepareConfig, console: "Console | None" = None) -> report.PrepareReport:
    """Make the dataset directory `config.out` and return the account of it (also stored as report.json).

    What is done of it is kept beside `out` until all is done, so that the same call goes on after whatever ended one.

    Args:
      console: where the progress is shown.
    Raises:
      FileNotFoundError: a source or tokenizer does not exist.
      FileExistsError: `out` exists and `overwrite` is False, or it is no dataset, or holds an input, or another process
        prepares it.
      ValueError: unreadable input under the policy "error", no text, or a tokenizer that cannot be trained or has no
        chat tokens.
      OSError: the disk is full.
    """
    start = time.perf_counter()
    inputs = (path for each in config.inputs for path in sources.paths(each))
    check_out(config.out, config.overwrite, inputs)  # before a tokenizer is trained
    with report.Progress(console) as progress, Work(here(config.out), progress.note) as work:
        job = _Job(config, work, progress)
        tok = None if job.trains else make_tokenizer(config)
        texts = job.clean(job.find_evaluation())
        read = stages.merge(map(stages.read_account, texts))
        _check_any(read, work)
        kept = job.find_copies(texts)
        job.notes += repeated_ids(Texts(tuple(texts), config.chat), kept)
        verdicts, left = job.find_repeats(texts, kept)
        tok = tok or job.train(texts, left, read.totals[3])
        encoded = job.encode(texts, kept, verdicts, tok)
        account = stages.merge([read, *map(stages.read_account, encoded)])
        _check_any(account, work)
        with DatasetWriter(config.out, tok, config.dataset_kind, config.overwrite) as writer:
            progress.begin("writing")
            opened = lru_cache(maxsize=64)(EncodedPart)
            for split, part, *stretch in _stretches(encoded, config.validation, config.seed):
                documents = opened(part, token_dtype(tok), config.chat)
                for stored in documents.stretches(*stretch, partial(writer.room, split)):
                    writer.add(split, stored)
                    progress.advance(len(stored.lengths), stored.text_bytes)
            directory = writer.seal()
            datasets = {split: Dataset.open(directory, split, verify=False) for split in SPLITS}
            progress.end()
            made = _report(config, account, tok, datasets, start)
            changes = {"stages": progress.seconds, "clusters": job.clusters, "notes": (*made.notes, *job.notes)}
            made = made.model_copy(update=changes)
            report.write_page(directory / "report.html", made, configs.dump(config))
            files.write_json(directory / "report.json", made.model_dump(mode="json"))
    return made


class _Job:
    """The stages, each of which finds what is done of it and does the rest; all give their results part by part."""

    def __init__(self, config: PrepareConfig, work: Work, progress: report.Progress):
        self.config, self.work, self.progress = config, work, progress
        self.trains = isinstance(config.tokenizer, TokenizerConfig)
        self.clusters: tuple[report.Cluster, ...] = ()  # of near duplicates, the largest
        self.notes: list[str] = []

    def find_evaluation(self) -> Path | None:
        """Read the evaluation texts, if there are any to keep out; return where their n-grams are."""
        config, against = self.config, self.config.decontaminate
        if not against.against:
            return None
        if config.chat:
            against = against.model_copy(update={"action": "drop"})  # a conversation is never cut
        stamped = [sources.parts(each) for each in against.against]
        [out] = self.work.keep("evaluation", [files.fingerprint(repr((__version__, against, config.clean, stamped)))])
        if not out.exists():
            with stages.result(out) as directory:
                decontaminate.write(against, partial(rewrite, config=config.clean, chat=config.chat), directory)
        self.notes += decontaminate.read(out).notes()
        return out

    def clean(self, evaluation: Path | None) -> list[Path]:
        """Read and clean; return where the documents are."""
        config = self.config
        rest = (config.clean, config.chat, config.errors, evaluation)
        tasks = [Clean(Path(), inputs, *rest) for inputs in parts(config)]
        tasks = self._placed("text", tasks)
        self._run("reading for the tokenizer" if self.trains else "reading", tasks)
        return [task.out for task in tasks]

    def find_copies(self, texts: Sequence[Path]) -> list[Path]:
        """Compare the documents of all parts; return the files that say which are kept."""
        [out] = self.work.keep("kept", [files.fingerprint(*(path.name for path in texts), repr(self.config.clean))])
        paths = [out / f"{path.name}.npy" for path in texts]
        if not out.exists():
            with stages.result(out) as directory:
                if self.config.clean.deduplicate and isinstance(self.config.engine, BeamEngine):
                    beam.keep_first(texts, directory, self.config.engine.options)
                    return paths
                kept = [np.load(path / "digests.npy") for path in texts]
                kept = stages.keep_first(kept) if self.config.clean.deduplicate else [each[:, 0] >= 0 for each in kept]
                for path, each in zip(paths, kept, strict=True):
                    save_array(directory / path.name, each)
        return paths

    def train(self, texts: Sequence[Path], kept: Sequence[Path], size_bytes: int) -> Tokenizer:
        """Train the tokenizer on `size_bytes` of text, or load it."""
        [out] = self.work.keep("trained", [files.fingerprint(kept[0].parent.name, repr(self.config.tokenizer))])
        if not out.exists():
            share = SAMPLES * self.config.tokenizer.sample_bytes / size_bytes
            now = iter(
                lambda: self.progress.begin("training the tokenizer"), None
            )  # no text: it is said after the last
            told = chain(_sample(texts, kept, share, self.config.chat), now)
            with stages.result(out) as directory:
                tokenizer.train(told, self.config.tokenizer).save(directory)
        return tokenizer.load(out)

    def find_repeats(self, texts: Sequence[Path], kept: Sequence[Path]) -> tuple[list[Verdicts | None], Sequence[Path]]:
        """Compare what documents hold, if that is asked for; return what is said of each part, and which are left."""
        dedup, texts = self.config.dedup, Texts(tuple(texts), self.config.chat)
        if not (dedup.near or dedup.paragraphs != "keep"):
            return [None] * len(kept), kept
        tasks = [Sign(Path(), path, dedup, self.config.chat) for path in texts.paths]
        outs = self.work.keep("signed", [files.fingerprint(task.key) for task in tasks])
        tasks = [replace(task, out=out) for task, out in zip(tasks, outs, strict=True)]
        self._run("comparing", tasks)
        names = [path.name for path in (*outs, kept[0].parent)]
        [out] = self.work.keep("decided", [files.fingerprint(*names, repr(dedup))])
        if not out.exists():
            scratch = TemporaryDirectory(dir=self.work.path, prefix=".near.", suffix=".tmp")
            with stages.result(out) as directory, scratch as place:
                find = partial(near_duplicates, outs, config=dedup, texts=texts)
                if isinstance(self.config.engine, BeamEngine):
                    options = self.config.engine.options
                    find = lambda stays: beam.near_duplicates(outs, stays, dedup, texts, options, Path(place))
                decide(texts, outs, kept, dedup, directory, find)
        self.clusters = tuple(report.Cluster(**each) for each in files.read_json(out / "clusters.json"))
        verdicts = [Verdicts(out / f"{path.stem}.near.npy", one, dedup) for path, one in zip(kept, outs, strict=True)]
        return verdicts, [out / path.name for path in kept]

    def encode(
        self, texts: Sequence[Path], kept: Sequence[Path], verdicts: Sequence[Verdicts | None], tok: Tokenizer
    ) -> list[Path]:
        """Turn the documents into ids; return where they are."""
        config, asked = self.config, self.config.tokenizer
        [model] = self.work.keep("tokenizer", [tok.fingerprint])
        if not model.exists():
            with stages.result(model) as directory:
                tok.save(directory)
        named = asked.path if isinstance(asked, ExistingTokenizer) else ""
        shared = {"tokenizer": model, "named": named, "chat": config.chat, "errors": config.errors}
        parts = zip(texts, kept, verdicts, strict=True)
        tasks = [Encode(Path(), text, keep, verdicts=said, **shared) for text, keep, said in parts]
        tasks = self._placed("ids", tasks)
        self._run("reading and tokenising", tasks)
        return [task.out for task in tasks]

    def _placed(self, stage: str, tasks: Sequence[Clean | Encode]) -> list[Clean | Encode]:
        """Give the tasks their places; what was done under the policy "error" had none and is right under any."""
        places = []
        for task in tasks:
            first, own = (files.fingerprint(task.key, errors) for errors in ("error", task.errors))
            places.append(first if (self.work.path / f"{stage}-{first}").exists() else own)
        outs = self.work.keep(stage, places)
        return [replace(task, out=out) for task, out in zip(tasks, outs, strict=True)]

    def _run(self, stage: str, tasks: Sequence[engine.Task]) -> None:
        self.progress.begin(stage)
        if done := sum(task.out.exists() for task in tasks):
            self.progress.note(f"{stage}: {done} of {count(len(tasks), 'part')} found done in {self.work.path}")
        if isinstance(self.config.engine, BeamEngine):
            beam.run(tasks, self.config.engine.options)
        else:
            engine.run(tasks, self.config.engine.workers, self.progress.advance)


def parts(config: PrepareConfig) -> list[tuple[sources.Part, ...]]:
    """Return the inputs cut into what one worker reads at a time: files that follow each other, or stretches of one.

    These have up to `part_bytes`, or less where all inputs are small, so that there is work for many.
    """
    found = list(chain.from_iterable(map(sources.parts, config.inputs)))
    step = min(config.part_bytes, max(LEAST_BYTES, sum(each.size or 0 for each in found) // ENOUGH_PARTS))
    result: list[list[sources.Part]] = []
    total = 0
    for each in chain.from_iterable(sources.cut(each, max(step, LEAST_BYTES)) for each in found):
        size = 0 if each.size is None else each.stop - each.first
        if not result or total + size > step or each.size is None:
            result.append([])
            total = 0
        result[-1].append(each)
        total += size
    return [tuple(each) for each in result]


def make_tokenizer(config: PrepareConfig) -> Tokenizer:
    """Load or build a tokenizer that needs no training."""
    asked = config.tokenizer
    tok = tokenizer.load(asked.path) if isinstance(asked, ExistingTokenizer) else tokenizer.byte_tokenizer()
    if config.chat:
        template_of(tok)  # without one, every conversation would be a problem of its own
    return tok


def _sample(texts: Sequence[Path], kept: Sequence[Path], share: float, chat: bool) -> Iterator[str]:
    """The texts that are kept, or an evenly spread share of them, below 1."""
    draw = np.random.Generator(np.random.Philox(0))  # the same for a document, whatever the parts are
    for path, keep in zip(texts, kept, strict=True):
        chosen = np.load(keep)
        if share < 1:
            chosen &= draw.random(len(chosen)) < share
        for item in stages.read_documents(path, chat, chosen):
            yield from stages.texts(item)


def _stretches(encoded: Sequence[Path], validation: float, seed: int) -> Iterator[tuple[str, Path, int, int]]:
    """(split, part, start, stop) of all documents, in the order that each split is to have."""
    last: dict[str, tuple[Path, int, int]] = {}
    sizes = ((part, len(np.load(part / "index.npy", mmap_mode="r")) - 1) for part in encoded)
    numbered = ((part, number) for part, size in sizes for number in range(size))
    for split, (part, number) in assign_splits(numbered, validation, seed):
        before, start, stop = last.get(split, (part, number, number))
        if (before, stop) != (part, number):
            yield split, before, start, stop
            start = number
        last[split] = part, start, number + 1
    yield from ((split, *each) for split, each in last.items())


def assign_splits(items: Iterable[T], validation: float, seed: int) -> Iterator[tuple[str, T]]:
    """Yield (split, item), deciding by a hash of the seed and the item's number.

    Args:
      validation: below 1, each item but the first is held out with this probability; from 1 on, exactly so many items
        are, spread evenly (a bottom-k sample: it keeps them in memory until the end).
    """
    held: list[tuple[float, int, T]] = []  # a heap whose top has the largest key
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


def _check_any(account: Account, work: Work) -> None:
    """Raise ValueError if no text is left, of which nothing is worth keeping."""
    n_read, _, n_kept, _ = account.totals
    if n_kept:
        return
    work.clear()
    problems = account.problems
    dropped = ", ".join(f"{name} dropped {rule.dropped}" for name, rule in account.rules.items() if rule.dropped)
    first = f" (first: {problems.examples[0]})" if problems.count else ""
    raise ValueError(
        f"no text is left: {count(n_read, 'document')} read, {count(problems.count, 'input')} unreadable"
        f"{first}, {dropped or 'no rule dropped any'}; check the sources"
    )


def _report(
    config: PrepareConfig, account: Account, tok: Tokenizer, datasets: dict[str, Dataset], start: float
) -> report.PrepareReport:
    asked = config.tokenizer
    found = asked.path if isinstance(asked, ExistingTokenizer) else asked.kind
    flow = lambda numbers: dict(zip(FLOW, numbers, strict=True))
    can_cut = not config.chat and any(getattr(each, "split", "") == "file" for each in config.inputs)
    rows = plan(datasets["train"], PackingConfig(seq_len=config.seq_len, long="drop"))
    return report.PrepareReport(
        directory=config.out, kind=config.dataset_kind,
        **flow(account.totals),
        problems=account.problems.count, problem_examples=tuple(account.problems.examples),
        replaced=account.problems.replaced,
        rules=account.rules,
        tokenizer=asked.algorithm if isinstance(asked, TokenizerConfig) else found,
        vocab_size=tok.vocab_size, bytes_per_token=datasets["train"].bytes_per_token,
        splits={
            split: report.SplitReport(documents=len(each), tokens=int(each.starts[-1]), trained=each.n_trained)
            for split, each in datasets.items()
        },
        packing=report.PackingReport(seq_len=config.seq_len, rows=len(rows), waste=rows.waste, dropped=rows.dropped),
        seconds=time.perf_counter() - start,
        inputs=tuple(report.InputReport(name=name, **flow(numbers)) for name, numbers in account.inputs.items()),
        languages={
            name: report.LanguageReport(documents=n, bytes=size)
            for name, (n, size) in sorted(account.languages.items(), key=lambda each: -each[1][1])
            if n
        },
        lengths=tuple(report.lengths_of(datasets["train"].lengths)),
        notes=(*_notes(config, account, tok), *report.held_out_notes(datasets, config.validation, can_cut)),
    )  # fmt: skip


def _notes(config: PrepareConfig, account: Account, tok: Tokenizer) -> Iterator[str]:
    yield from (f"{text}: {n:,}" for text, n in account.problems.notes.items())
    asked, size = config.tokenizer, tok.vocab_size
    if isinstance(asked, TokenizerConfig):
        alphabet = len(tok.special) + 256 + sum(len(piece) == 1 for piece in tok.pieces.scored()[0])  # the least
        left = account.totals[3]
        enough = 100 * max(-(-alphabet // 100), left // BYTES_PER_ID // 100)
        if size < asked.vocab_size:
            yield f"the text has pieces for a vocabulary of {size} only, not of {asked.vocab_size}"
        elif size > enough:
            yield (
                f"a vocabulary of {size:,} is large for {count(left, 'byte')} of text: most ids are too "
                f"rare to be learned; use --vocab-size {enough} or more text"
            )
