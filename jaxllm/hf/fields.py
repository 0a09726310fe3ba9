"""Reading a config.json so that no key is overlooked: each is translated, known to change nothing, or an error.

The metadata of a GGUF file is read in the same way.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml
from flax.traverse_util import flatten_dict

from jaxllm.core.config import Config

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu",
}  # fmt: skip
NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
# Fields where null means none; elsewhere it means the same as absence.
NULLABLE = {"n_kv_heads", "mla.query_rank", "window.size", "score_softcap", "logit_softcap"}

# Keys that change no forward pass: training, bookkeeping, tokens (which the tokenizer knows), how fast it is computed.
HARMLESS = frozenset(
    """
    _name_or_path architectures attention_dropout attn_implementation attn_pdrop auto_map bad_words_ids bos_token_id
    cache_implementation chunk_size_feed_forward classifier_dropout cls_token_id dtype embd_pdrop embedding_dropout
    eos_token_id finetuning_task gradient_checkpointing hidden_dropout id2label is_decoder is_encoder_decoder label2id
    max_window_layers model_type name_or_path output_attentions output_hidden_states pad_token_id prefix pretraining_tp
    problem_type reorder_and_upcast_attn resid_pdrop residual_dropout return_dict sep_token_id summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj task_specific_params tokenizer_class
    torch_dtype transformers_version use_cache unsloth_fixed unsloth_version _num_labels
    """.split()  # noqa: SIM905
)
# Values that say what is computed anyway.
MEANINGLESS = (
    ("use_mrope", False), ("is_llama_config", True), ("rope_interleaved", False), ("mlp_type", "default"),
    ("norm_type", "layer_norm"), ("lm_head_bias", False), ("attention_bias", False), ("mlp_bias", False),
)  # fmt: skip


class Fields:
    """A config.json that remembers which keys were read, and what was wrong with them.

    Args:
      source: what errors call it.
    Attributes:
      problems: what does not fit, in words; `finish` raises them all at once.
    """

    def __init__(self, raw: Mapping[str, Any], source: str = "config.json"):
        self._raw = raw
        self._source = source
        self._read: set[str] = set()
        self.problems: list[str] = []

    def __contains__(self, key: str) -> bool:
        return self._raw.get(key) is not None

    def take(self, key: str, default: Any = None) -> Any:
        """Return a value; null and absent mean the default."""
        self._read.add(key)
        value = self._raw.get(key)
        return default if value is None else value

    def get(self, key: str, absent: Any) -> Any:
        """Return a value where null means none, and only absence means the family's default."""
        self._read.add(key)
        return self._raw.get(key, absent)

    def need(self, key: str) -> Any:
        """Return a value that no family has a default for.

        Raises:
          ValueError: it is not there.
        """
        if key not in self:
            raise ValueError(f"{self._source} has no {key}; it is not complete")
        return self.take(key)

    def expect(self, key: str, wanted: Any) -> None:
        """Accept a key only with the value that we compute, which is also what absent means."""
        if (value := self.take(key, wanted)) != wanted:
            self.problems.append(f"{key}={value!r}: only {wanted!r} is computed here")

    def among(self, key: str, table: Mapping[Any, Any], default: Any) -> Any:
        """Return the table's entry for a value."""
        value = self.take(key, default)
        if value not in table:
            self.problems.append(f"{key}={value!r}: known are {', '.join(map(str, table))}")
            value = default
        return table[value]

    def finish(self, name: str) -> None:
        """Raise one error with everything that is wrong, also with the keys that nobody read.

        Raises:
          ValueError: there is something.
        """
        unread = sorted(
            key for key, value in self._raw.items()
            if key not in self._read | HARMLESS and value is not None and (key, value) not in MEANINGLESS
        )  # fmt: skip
        problems = self.problems + [f"{key}={self._raw[key]!r}: unknown, and it may change the model" for key in unread]
        if problems:
            raise ValueError(
                f"{name} cannot be read exactly:\n  " + "\n  ".join(problems) + f"\nRemove a key from {self._source} "
                "only if you know that it changes nothing; else this model is not supported"
            )


class Vocabulary(NamedTuple):
    """What a family says as everyone does: a key of config.json is a field of the configuration.

    Attributes:
      keys: {key: (field, what absence means)}, without the second where it must be there.
      fixed: {field: value}, of every model of the family. only: {key: the one value that is computed}.
      writes: {key: name of a field, or a constant}, which are written and not read.
      ignored: keys that change nothing in this family.
    """

    keys: Mapping[str, list[Any]]
    fixed: Mapping[str, Any]
    only: Mapping[str, Any]
    writes: Mapping[str, Any]
    ignored: Collection[str]

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Self:
        """Take it out of an entry of families.yaml, encoders.yaml or gguf.yaml."""
        return cls(*(entry.pop(name, {}) for name in cls._fields))

    def read(self, fields: Fields) -> dict[str, Any]:
        """Return {field: value}, of nested fields as "norm.eps"."""
        found = dict(self.fixed)
        for key, (field, *absent) in self.keys.items():
            found[field] = _read(fields, key, field, absent[0]) if absent else fields.need(key)
        for key, value in self.only.items():
            fields.expect(key, value)
        for key in self.ignored:
            fields.take(key)
        return found

    def write(self, config: Config | Mapping[str, Any]) -> dict[str, Any]:
        """Return the config.json of a configuration, or of {field: value}, as far as the table goes.

        Raises:
          ValueError, KeyError: there are no words for something in it.
        """
        found = flatten_dict(config.model_dump(), sep=".") if isinstance(config, Config) else config
        for field, value in self.fixed.items():
            if found.get(field) != value:
                raise ValueError(f"{field}={found.get(field)!r}: only {value!r} in this family")
        written = {key: _written(found, *field) for key, field in self.keys.items()}
        for key, value in self.writes.items():
            written[key] = _written(found, value) if isinstance(value, str) else value
        return written


def _read(fields: Fields, key: str, field: str, absent: Any) -> Any:
    if field.endswith("activation"):
        return fields.among(key, ACTIVATIONS, absent)
    if isinstance(absent, bool):
        return fields.among(key, {True: True, False: False}, absent)
    return fields.get(key, absent) if field in NULLABLE else fields.take(key, absent)


def _written(found: Mapping[str, Any], field: str, absent: Any = None) -> Any:
    if field not in found:
        return found[field.rpartition(".")[0]]  # None: the model has no such part
    if field.endswith("activation"):
        return absent if ACTIVATIONS[absent] == found[field] else NAMES[found[field]]
    return found[field]


def entries(name: str) -> dict[str, dict[str, Any]]:
    """Return the families of a table beside this module."""
    return yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))["families"]
