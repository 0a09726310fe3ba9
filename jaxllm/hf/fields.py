"""Reading a config.json so that no key is overlooked: each is translated, known to change nothing, or an error.

The metadata of a GGUF file is read in the same way.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import yaml
from flax.traverse_util import flatten_dict, unflatten_dict
from pydantic import ValidationError

from jaxllm.core.config import Config, place

C = TypeVar("C", bound=Config)

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu",
}  # fmt: skip
NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
KINDS = {bool: "true or false", int | float: "a number", list: "a list", Mapping: "keys and values"}
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

    def take(self, key: str, default: Any = None, like: Any = None) -> Any:
        """Return a value; null and absent mean the default. One of another type than it, or than `like`, is wrong."""
        self._read.add(key)
        value, like = self._raw.get(key), default if like is None else like
        if value is None:
            return default
        kind = next((kind for kind in KINDS if isinstance(like, kind)), object)
        if isinstance(value, kind) and (kind in (bool, object) or not isinstance(value, bool)):
            return value
        self.problems.append(f"{key}={value!r}: must be {KINDS[kind]}")
        return default

    def get(self, key: str, absent: Any) -> Any:
        """Return a number where null means none, and only absence means the family's default."""
        given = self.take(key, like=0)
        return given if key in self._raw else absent

    def need(self, key: str, absent: float | None = None) -> Any:
        """Return a number above zero that must be there, unless a family has a default for it."""
        if key not in self and absent is None:
            self.problems.append(f"{self._source} has no {key}; it is not complete")
        elif 0 < (value := self.take(key, absent or 1)) < math.inf:
            return value
        else:
            self.problems.append(f"{key}={value}: must be more than 0 and finite")
        return 1  # only to find what else is wrong

    def expect(self, key: str, wanted: Any) -> None:
        """Accept a key only with the value that we compute, which is also what absent means."""
        if (value := self.take(key)) not in (None, wanted):
            self.problems.append(f"{key}={value!r}: only {wanted!r} is computed here")

    def among(self, key: str, table: Mapping[Any, Any], default: Any) -> Any:
        """Return the table's entry for a value."""
        value = self.take(key)
        if value is not None and value not in list(table):  # which may be one that no table can hold
            self.problems.append(f"{key}={value!r}: known are {', '.join(map(str, table))}")
            value = None
        return table[default if value is None else value]

    def build(self, kind: type[C], found: Mapping[str, Any], keys: Mapping[str, list[Any]], name: str) -> C:
        """Return the configuration of {field: value}, of nested fields as "norm.eps"; errors as of `finish`.

        Args:
          keys: {key: [its field, ...]}, for what errors call a field.
        """
        spelled, tree = {field: key for key, (field, *_) in keys.items()}, unflatten_dict(found, sep=".")
        try:
            config = kind(**tree)
        except ValidationError as error:
            wrong = bool(self.problems)  # then what does not fit together says nothing
            for each in error.errors():
                field = place(each, tree)
                key = spelled.get(field) or spelled.get(f"both.{field.partition('.')[2]}", field)
                if each["type"] != "value_error":
                    self.problems.append(f"{key}={each['input']!r}: {each['msg'].replace('Input should', 'must')}")
                elif not wrong:
                    self.problems.append(str(each["ctx"]["error"]))
        self.finish(name)
        return config

    def finish(self, name: str) -> None:
        """Raise one error with everything that is wrong, also with the keys that nobody read.

        Raises:
          ValueError: there is something.
        """
        unread = sorted(
            key for key, value in self._raw.items()
            if key not in self._read | HARMLESS and value is not None and (key, value) not in MEANINGLESS
        )  # fmt: skip
        problems = list(dict.fromkeys(self.problems))  # halves of one model say the same, and keys that are read twice
        problems += [f"{key}={self._raw[key]!r}: unknown, and it may change the model" for key in unread]
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
    return fields.get(key, absent) if field in NULLABLE else fields.take(key, absent, 0 if absent is None else absent)


def _written(found: Mapping[str, Any], field: str, absent: Any = None) -> Any:
    if field not in found:
        return found[field.rpartition(".")[0]]  # None: the model has no such part
    if field.endswith("activation"):
        return absent if ACTIVATIONS[absent] == found[field] else NAMES[found[field]]
    return found[field]


def entries(name: str) -> dict[str, dict[str, Any]]:
    """Return the families of a table beside this module."""
    return yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))["families"]
