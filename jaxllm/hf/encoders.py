"""The families of encoders: BERT and RoBERTa, each with a head for tokens, for labels, or with none."""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jaxllm.hf.checkpoint import Tensors
from jaxllm.hf.fields import ACTIVATIONS, NAMES, Fields, Vocabulary, entries
from jaxllm.hf.rows import rows_of, sizes_of
from jaxllm.hf.table import Row, names
from jaxllm.models.encoder_config import Classes, Embeddings, EncoderConfig, HeadConfig, MaskedLM

BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")  # constants that old files have
SPELLED = NAMES | {"gelu_tanh": "gelu_new"}  # as encoders usually spell it
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
TRUNK = ("embeddings.", "encoder.", "pooler.")  # parts of the model below its head


class EncoderFamily(NamedTuple):
    """A model_type of transformers, which is also the first word of its tensors' names.

    Attributes:
      words: what it says as everyone does. title, heads, surplus, behind_pad, gelu: see encoders.yaml.
    """

    model_type: str
    words: Vocabulary
    title: str
    tensors: Mapping[str, str]
    heads: Mapping[str, Mapping[str, str]]
    surplus: list[str]
    behind_pad: bool = False
    gelu: bool = False

    def parse(self, raw: Mapping[str, Any], name: str, tensors: Collection[str] = ()) -> EncoderConfig:
        """Return the architecture that a config.json describes; errors as of `Fields.finish`, which call it `name`.

        Args:
          tensors: names in the checkpoint; whether there is a pooler, config.json does not say.
        """
        fields = Fields(raw)
        pooler = any(tensor.endswith("pooler.dense.weight") for tensor in tensors)
        found = self.words.read(fields) | {"head": self._read_head(fields, pooler)}
        if self.behind_pad:
            found["stack.positions.offset"] = offset = fields.take("pad_token_id", 1) + 1
            found["stack.max_seq_len"] -= offset  # the rows of the table before it are not used
        return fields.build(EncoderConfig, found, self.words.keys, name)

    def _read_head(self, fields: Fields, pooler: bool) -> HeadConfig:
        heads = {f"{self.title}ForMaskedLM", f"{self.title}ForSequenceClassification", f"{self.title}Model"}
        architecture = (fields.take("architectures", []) or [None])[0]
        if architecture == f"{self.title}ForMaskedLM":
            activation = "gelu" if self.gelu else fields.among("hidden_act", ACTIVATIONS, "gelu")
            return MaskedLM(activation=activation)
        if architecture == f"{self.title}ForSequenceClassification":
            return _read_classes(fields)
        if architecture != f"{self.title}Model":
            fields.problems.append(f"architectures={[architecture]}: known are {', '.join(sorted(heads))}")
        return Embeddings(pooler=pooler)

    def write(self, config: EncoderConfig) -> dict[str, Any]:
        """Return the config.json of an architecture.

        Raises:
          ValueError: this family has no words for it.
        """
        stack, head = config.stack, config.head
        offset = stack.positions.offset
        if (offset > 0) != self.behind_pad:
            raise ValueError(f"{self.model_type} counts positions from elsewhere")
        kind = {"masked_lm": "ForMaskedLM", "classes": "ForSequenceClassification", "embeddings": "Model"}[head.kind]
        written = {"architectures": [self.title + kind], "model_type": self.model_type, **self.words.write(config)}
        written["hidden_act"] = SPELLED[stack.ffn.activation]
        if self.behind_pad:
            written |= {"pad_token_id": offset - 1, "max_position_embeddings": stack.max_seq_len + offset}
        if isinstance(head, Classes):
            written["id2label"] = {str(index): label for index, label in enumerate(head.labels)}
            written["label2id"] = {label: index for index, label in enumerate(head.labels)}
            written["problem_type"] = head.problem
        return written

    def rows(self, config: EncoderConfig) -> list[Row]:
        """Return where each parameter is in the checkpoint."""
        # Files of a model without a head have its tensors without the first word.
        prefix = "" if isinstance(config.head, Embeddings) else f"{self.model_type}."
        names = {**self.tensors, **self.heads[config.head.kind]}
        if not config.tie_embeddings and "stack/head" in names:
            names["head"] = names["stack/head"]
        return rows_of(
            {ours: prefix + name if name.startswith(TRUNK) else name for ours, name in names.items()}, config
        )

    def open(self, checkpoint: Tensors, config: EncoderConfig) -> Tensors:
        """Return the checkpoint under the table's names; errors as of `Tensors.under`.

        Constants, copies of tied tensors and what other heads left behind are dropped.
        """
        wanted = {name for row in self.rows(config) for name in names(row, sizes_of(config))}
        ignored, copies = list(BUFFERS), {}
        if not isinstance(config.head, Embeddings):
            ignored += self.surplus
        if isinstance(config.head, MaskedLM):
            bias, matrix = (self.heads["masked_lm"][ours] for ours in ("head", "stack/head"))
            if config.tie_embeddings:
                table = f"{self.model_type}.embeddings.word_embeddings.weight"
                copies = {f"{matrix}.weight": table, f"{matrix}.bias": f"{bias}.bias"}
            else:  # the matrix has a bias of its own, and transformers saves the other one without reading it
                ignored.append(f"{bias}.bias")
        return checkpoint.under(wanted, first=self.model_type, copies=copies, ignored="|".join(map(re.escape, ignored)))


def _read_classes(fields: Fields) -> Classes:
    """Return the labels; without names they are LABEL_0, LABEL_1, ..., of which transformers assumes two."""
    unnamed = {index: f"LABEL_{index}" for index in range(fields.take("num_labels", 2))}
    named = {int(index): label for index, label in fields.take("id2label", unnamed).items()}
    if set(named) != set(range(len(named))):
        fields.problems.append(f"id2label has the numbers {sorted(named)}: they must be 0, 1, 2, ...")
    labels = tuple(named[index] for index in sorted(named))
    absent = "regression" if len(labels) == 1 else PROBLEMS[0]
    return Classes(
        labels=labels, problem=fields.among("problem_type", dict(zip(PROBLEMS, PROBLEMS, strict=True)), absent)
    )


ENCODERS: Mapping[str, EncoderFamily] = {
    name: EncoderFamily(name, words=Vocabulary.of(entry), **entry) for name, entry in entries("encoders.yaml").items()
}
