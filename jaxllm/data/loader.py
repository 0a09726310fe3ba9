"""The loader: batches by arithmetic.

The content of global sample i is a function of (data, packing, seed, i) alone. So resuming is O(1) and exact, and
another batch size or another number of processes sees the same samples in the same order. Grain reads ahead in threads;
it decides nothing.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import ceil
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from jaxllm.core import files
from jaxllm.core.batch import Batch, LabelledTexts, TextPairs
from jaxllm.core.config import Config
from jaxllm.data.masking import MaskRule, mask_tokens
from jaxllm.data.mixture import Mixture
from jaxllm.data.objectives import HiddenTokens, NextToken, Objective
from jaxllm.data.packing import PackingConfig
from jaxllm.data.pairs import plan_of
from jaxllm.data.shards import Dataset
from jaxllm.data.tokenizers import tokenizer as tokenizers

AnyBatch = Batch | TextPairs | LabelledTexts


class DataExhausted(ValueError):
    """Training asked for more samples than `epochs` allows."""


class Source(Config):
    """One dataset of the mixture."""

    path: str = Field(description="dataset directory, written by prepare")
    weight: float = Field(1.0, gt=0, description="share of the samples (rows), relative to the other sources")
    epochs: int | None = Field(None, ge=1, description="most passes over this source: the data ends before one more")
    validate_on: bool = Field(True, description="count its validation split in the validation loss")


class Stage(Config):
    """A part of a curriculum, with its own mixture."""

    tokens: float | None = Field(None, gt=0, description="length, positions (2e9); the last stage has none, and stays")
    weights: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        min_length=1, description="share of each source meanwhile, in the order of data.sources, instead of its weight"
    )


class DataConfig(Config):
    """What to train on and in which order."""

    sources: tuple[Source, ...] = Field(
        min_length=1, description="datasets; one pass over the first (of the last stage) is an epoch, the others repeat"
    )
    objective: Objective = Field(NextToken(), description="what is learned; it goes with the kind of model")
    stages: tuple[Stage, ...] = Field((), description="a curriculum: mixtures that follow one another; none = one")
    packing: PackingConfig = Field(PackingConfig(), description="how documents become rows")
    batch_size: int = Field(16, ge=1, description="rows per step, over all processes")
    seed: int = Field(0, ge=0, description="decides the order of the samples, and which tokens are hidden")
    epochs: int | None = Field(
        None, ge=1, description="stop with an error after so many epochs; empty: repeat for ever, reshuffled"
    )
    verify: bool = Field(True, description="compare checksums of all shards at the start (about 1 s per GB)")
    threads: int = Field(2, ge=0, description="threads that read ahead; 0: read when asked")
    prefetch: int = Field(4, ge=1, description="batches to read ahead")

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        *first, last = (stage.tokens for stage in self.stages) if self.stages else (None,)
        if None in first or last is not None:
            raise ValueError("data.stages: each but the last needs tokens, its length, and the last has none")
        for number, stage in enumerate(self.stages):
            if len(stage.weights) != len(self.sources) or not any(stage.weights):
                raise ValueError(
                    f"data.stages.{number}.weights={list(stage.weights)} must have one weight for each of the "
                    f"{len(self.sources)} sources, not all of them 0"
                )
        return self

    @classmethod
    def of(cls, dataset: str, seq_len: int, batch_size: int) -> "DataConfig":
        """Return one dataset, to be looked at or measured; conversations that are longer than a row are left out."""
        packing = PackingConfig(seq_len=seq_len, long="drop")
        return cls(sources=(Source(path=dataset),), packing=packing, batch_size=batch_size)


class Loader(Iterator[AnyBatch]):
    """Iterator over host-local batches, NumPy arrays [batch_size * len(parts) / count, T].

    What a batch is follows from `config.objective`: pairs are `TextPairs`, texts with labels `LabelledTexts`.

    Part n of `count` is the n-th of so many equal pieces of the global batch, which is the same for every count. The
    last batch of a finite order is filled up with rows of weight 0.

    Args:
      split: "train" (shuffled, repeated) or "validation" (stored order, one pass).
      parts: those to read, in ascending order, as `sharding.mesh.reader` has them.

    Attributes:
      samples_per_epoch: rows that one pass over the first source takes, with the rows mixed in; for validation, all.
      n_samples: until the data is exhausted; None: never.
      vocab_size: ids that batches may have: of the tokenizer, and the mask where tokens are hidden.

    Raises:
      ValueError: the sources differ in tokenizer, batch_size does not divide, or the split is empty.
    """

    def __init__(
        self,
        config: DataConfig,
        split: Literal["train", "validation"] = "train",
        parts: Sequence[int] = (0,),
        count: int = 1,
    ):
        size = config.batch_size
        if size % count and len(parts) < count:  # who reads all parts needs no borders
            raise ValueError(
                f"batch_size={size} is not divisible by {count} parts; use a multiple of {count}, such as "
                f"{-(-size // count) * count}"
            )
        self.config = config
        self.split = split
        self._rows = [row for part in parts for row in range(part * size // count, (part + 1) * size // count)]
        self.sources = [source for source in config.sources if split == "train" or source.validate_on]
        self.datasets = [Dataset.open(source.path, split, config.verify) for source in self.sources]
        for dataset in self.datasets:
            first = self.datasets[0]
            if dataset.tokenizer_fingerprint != first.tokenizer_fingerprint:
                raise ValueError(
                    f"{dataset.directory} was tokenised with {dataset.tokenizer_fingerprint}, {first.directory} with "
                    f"{first.tokenizer_fingerprint}; prepare both with the same --tokenizer"
                )
        self.tokenizer_dir, self.tokenizer_fingerprint = first.tokenizer_dir, first.tokenizer_fingerprint
        self.vocab_size = first.vocab_size
        objective, tokenizer = config.objective, tokenizers.load(self.tokenizer_dir)
        self.plans = [plan_of(objective, dataset, config.packing, tokenizer) for dataset in self.datasets]
        self._rule: MaskRule | None = None
        if isinstance(objective, HiddenTokens):
            drawn = self.vocab_size  # what stands in for others is never the mask behind them
            self.vocab_size = max(drawn, tokenizer.mask_id + 1)
            self._rule = MaskRule(tokenizer.mask_id, drawn, objective.rate, objective.hidden, objective.random)
            self._kept = np.array(sorted(tokenizer.special.values()))
        sizes = [len(each) for each in self.plans]
        if not sum(sizes) or (split == "train" and not all(sizes)):
            paths = ", ".join(source.path for source in config.sources)
            raise ValueError(
                f"split {split!r} of {paths} has no rows; prepare with a larger --validation share or more data"
            )
        if split == "train":
            epochs = [source.epochs for source in self.sources]
            epochs[0] = min((limit for limit in (epochs[0], config.epochs) if limit), default=None)
            self._order = Mixture.shuffled(sizes, self._stages(), config.seed, epochs)
        else:
            self._order = Mixture.in_sequence(sizes)
        self.n_samples, self.samples_per_epoch = self._order.n_samples, self._order.samples_per_epoch
        self._sample = 0
        self._batches: Iterator[AnyBatch] | None = None

    def __next__(self) -> AnyBatch:
        total = self.n_samples
        if total is not None and self._sample >= total:
            if self.split == "validation":
                raise StopIteration
            raise DataExhausted(
                f"all {total} samples that data.epochs={self.config.epochs} and the epochs of the sources allow are "
                f"used ({self.samples_per_epoch} are an epoch); set them higher, or leave them empty to repeat for ever"
            )
        if self._batches is None:
            self._batches = self._read_from(self._sample)
        batch = next(self._batches)
        self._sample += self.config.batch_size if total is None else min(self.config.batch_size, total - self._sample)
        return batch

    def _stages(self) -> list[tuple[int, Sequence[float]]]:
        """(first sample, weights) of each stage; a stage begins with a whole row."""
        stages, seq_len = self.config.stages, self.config.packing.seq_len
        starts = accumulate((stage.tokens or 0 for stage in stages), initial=0)
        found = [(ceil(start / seq_len), stage.weights) for start, stage in zip(starts, stages, strict=False)]
        return found or [(0, [source.weight for source in self.sources])]

    def passes(self, samples: int) -> list[float]:
        """Return how often each source is passed over in the first `samples` samples of training."""
        return [used / len(each) for used, each in zip(self._order.used(samples), self.plans, strict=True)]

    def get_state(self) -> dict[str, int]:
        """Position: the number of global samples delivered."""
        return {"sample": self._sample}

    def set_state(self, state: dict[str, int]) -> None:
        """Continue at `state`; {"sample": 0} starts again."""
        self._sample = state["sample"]
        self._batches = None

    @property
    def texts_per_row(self) -> int:
        """Most texts of a row; 1 where rows cut texts."""
        return max(each.texts_per_row for each in self.plans)

    @property
    def fingerprint(self) -> str:
        """Identity of the sample order: data, tokenizer, packing, mixture, seed; not batch size or processes."""
        contents = [(each.fingerprint, source.weight) for each, source in zip(self.datasets, self.sources, strict=True)]
        contents += [stage.model_dump_json() for stage in self.config.stages]
        parts = [repr(contents), self.config.packing.model_dump_json(), self.split, str(self.config.seed)]
        if not isinstance(self.config.objective, NextToken):
            parts.append(self.config.objective.model_dump_json())
        return files.fingerprint(*parts)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per trained token over all sources of this split."""
        tokens = [each.n_trained for each in self.datasets]
        return sum(each.bytes_per_token * n for each, n in zip(self.datasets, tokens, strict=True)) / sum(tokens)

    def notes(self) -> list[str]:
        """Say of each dataset how many conversations or texts are left out."""
        return [
            f"note: {each.dropped:,} of {len(each.dataset):,} {each.what}s of {each.dataset.directory} are longer "
            f"than data.packing.seq_len={each.seq_len} and left out; raise it to have them"
            for each in self.plans if each.dropped
        ]  # fmt: skip

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, row of its plan) of a global sample."""
        return self._order[sample]

    def row(self, sample: int) -> AnyBatch:
        """Row [T] of a global sample; past the end, a row of padding."""
        if self.n_samples is not None and sample >= self.n_samples:
            row = self.plans[0].row(0)
            return type(row)(*(np.zeros_like(array) for array in row))
        source, index = self._order[sample]
        row = self.plans[source].row(index)
        if self._rule is None:
            return row
        maskable = (row.segments > 0) & ~np.isin(row.tokens, self._kept)
        return row._replace(**mask_tokens(row.tokens, maskable, self._rule, self.config.seed, sample)._asdict())

    def _read_from(self, start: int) -> Iterator[AnyBatch]:
        import grain  # here, because it takes seconds and imports jax

        options = grain.ReadOptions(
            num_threads=self.config.threads, prefetch_buffer_size=self.config.prefetch if self.config.threads else 0
        )
        size = self.config.batch_size
        count = 1 << 62 if self.n_samples is None else -(-(self.n_samples - start) // size)

        def batch(index: int) -> AnyBatch:
            rows = [self.row(start + index * size + row) for row in self._rows]
            return type(rows[0])(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))

        return iter(grain.MapDataset.range(count).map(batch).to_iter_dataset(options))
