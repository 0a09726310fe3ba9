"""Conversations of one answer as pairs: a source and its target, or a text and its label.

The source is the text of all messages before the answer, without the special tokens of the chat template, and eos. What
the tokenizer of a published model puts before a text (BART: <s>) is before the source and before the target.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxllm.core.batch import LabelledTexts, TextPairs
from jaxllm.data.objectives import HiddenTokens, Labels, Objective, Pairs
from jaxllm.data.packing import PackingConfig, Plan, WholePlan, plan
from jaxllm.data.shards import Dataset
from jaxllm.data.tokenizers.tokenizer import Tokenizer


class Sides:
    """The two sides of each conversation of a dataset.

    Args:
      begin: ids before each source; default: what the tokenizer puts there, and then before each target as well.
    Attributes:
      sources, targets: int64 [n_documents], tokens of either side.
    Raises:
      ValueError: the dataset has text, or conversations of several answers.
    """

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, begin: Sequence[int] | None = None):
        if dataset.kind != "chat":
            raise ValueError(f"{dataset.directory} has text, and pairs are conversations; prepare it with --chat")
        self._dataset, self._eos = dataset, tokenizer.eos_id
        usual = tokenizer.prefix if tokenizer.surrounds else ()
        self._begin, self._answer = (usual, usual) if begin is None else (begin, ())
        self._special = np.zeros(tokenizer.vocab_size, bool)
        self._special[list(tokenizer.special.values())] = True
        starts, end = dataset.starts[:-1], int(dataset.starts[-1])
        said = dataset.marks(0, end)
        begins = said & ~np.concatenate([[False], said[:-1]])
        count = lambda marks: np.add.reduceat(marks, starts, dtype=np.int64) if len(starts) else dataset.lengths
        if several := int((count(begins) != 1).sum()):
            raise ValueError(
                f"{several} of {len(dataset)} conversations of {dataset.directory} have several answers, and a pair "
                "has one; prepare conversations of one answer each"
            )
        answered = np.cumsum(begins) > np.repeat(np.arange(len(starts)), dataset.lengths)  # from the answer on
        self.sources = len(self._begin) + count(~answered & ~self._special[dataset.stream(0, end)]) + 1
        self.targets = len(self._answer) + count(said)

    def of(self, document: int) -> tuple[Int[np.ndarray, "S"], Int[np.ndarray, "T"]]:
        """Return (source, target) of a document."""
        tokens, said = self._dataset.tokens(document), self._dataset.trained(document)
        source = tokens[: int(said.argmax())]
        source = [*self._begin, *source[~self._special[source]], self._eos]
        return np.array(source), np.array([*self._answer, *tokens[said]])


class PairPlan(WholePlan):
    """Sources and targets, each in a row of its own, with the same segments; see `Sides`."""

    def __init__(self, dataset: Dataset, config: PackingConfig, tokenizer: Tokenizer):
        self.sides = Sides(dataset, tokenizer)
        super().__init__(dataset, config, np.maximum(self.sides.sources, self.sides.targets), "pair")

    def row(self, index: int) -> TextPairs:
        """Return row `index`, arrays [T]."""
        integers = np.zeros((4, self.seq_len), np.int32)
        row = TextPairs(integers[0], integers[1], integers[2], np.zeros(self.seq_len, np.float32), integers[3])
        read = written = 0
        for segment, document in enumerate(self.documents(index).tolist(), start=1):
            source, target = self.sides.of(document)
            row.sources[read : read + len(source)] = source
            row.source_segments[read : read + len(source)] = segment
            row.targets[written : written + len(target)] = target
            row.weights[written : written + len(target)] = 1
            row.segments[written : written + len(target)] = segment
            read, written = read + len(source), written + len(target)
        return row


class LabelPlan(WholePlan):
    """One text a row: bos and the source of a pair, whose target is the label; see `Sides`.

    Raises:
      ValueError: an answer that is no label; or as of `WholePlan`.
    """

    def __init__(self, dataset: Dataset, config: PackingConfig, tokenizer: Tokenizer, labels: tuple[str, ...]):
        self.sides = Sides(dataset, tokenizer, (tokenizer.bos_id,))
        said = [tokenizer.decode(self.sides.of(document)[1]) for document in range(len(dataset))]
        names = {tokenizer.decode(tokenizer.encode(label)): i for i, label in enumerate(labels)}  # as tokens spell them
        if len(names) < len(labels):
            raise ValueError(
                f"{dataset.directory}: to its tokenizer some of {', '.join(labels)} are the same; rename them"
            )
        if unknown := sorted({*said} - {*names}):
            raise ValueError(
                f"{dataset.directory} has the answers {', '.join(map(repr, unknown[:5]))}, and data.objective.labels "
                f"are {', '.join(map(repr, labels))}; name all answers there and in model.head.labels"
            )
        self._labels = np.array([names[each] for each in said], np.int32)
        # A text takes more than half a row, so that no two share one.
        sizes = np.maximum(self.sides.sources, config.seq_len // 2 + 1)
        super().__init__(dataset, config, sizes, "text")

    def row(self, index: int) -> LabelledTexts:
        """Return row `index`: tokens and segments [T], label and weight []."""
        [document] = self.documents(index).tolist()
        text, _ = self.sides.of(document)
        tokens, segments = np.zeros((2, self.seq_len), np.int32)
        tokens[: len(text)], segments[: len(text)] = text, 1
        return LabelledTexts(tokens, segments, self._labels[document], np.float32(1))


def plan_of(objective: Objective, dataset: Dataset, config: PackingConfig, tokenizer: Tokenizer) -> Plan:
    """Return the packing that an objective asks for: the same dataset and config give the same rows.

    Raises:
      ValueError: the dataset has text where conversations are needed, or the other way round; or as of the plan.
    """
    match objective:
        case Pairs():
            return PairPlan(dataset, config, tokenizer)
        case Labels(labels=labels):
            return LabelPlan(dataset, config, tokenizer, labels)
        case HiddenTokens() if dataset.kind == "chat":
            raise ValueError(
                f"{dataset.directory} has conversations, and tokens are hidden in text; prepare it without --chat"
            )
    return plan(dataset, config, shift=0 if isinstance(objective, HiddenTokens) else 1)
