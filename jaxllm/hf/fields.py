"""Reading a config.json so that no key is overlooked: each is translated, known to change nothing, or an error.

The metadata of a GGUF file is read in the same way.
"""

from collections.abc import Mapping
from typing import Any

# Keys that change no forward pass: training, bookkeeping, tokens (which the tokenizer knows), how fast it is computed.
HARMLESS = frozenset(
    """
    _name_or_path architectures attention_dropout attn_implementation attn_pdrop auto_map bad_words_ids
    bos_token_id cache_implementation chunk_size_feed_forward classifier_dropout cls_token_id dtype embd_pdrop
    embedding_dropout eos_token_id finetuning_task gradient_checkpointing hidden_dropout id2label is_decoder
    is_encoder_decoder label2id max_window_layers model_type name_or_path output_attentions output_hidden_states
    pad_token_id prefix pretraining_tp problem_type reorder_and_upcast_attn resid_pdrop residual_dropout
    return_dict sep_token_id summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj task_specific_params tokenizer_class torch_dtype transformers_version use_cache
    unsloth_fixed unsloth_version _num_labels
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

    def expect(self, key: str, *allowed: Any) -> None:
        """Accept a key only with one of the values that we compute; the first is what absent means."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            wanted = " or ".join(repr(each) for each in allowed)
            self.problems.append(f"{key}={value!r}: only {wanted} is computed here")

    def among(self, key: str, table: Mapping[str, Any], default: str) -> Any:
        """Return the table's entry for a value."""
        value = self.take(key, default)
        if value not in table:
            self.problems.append(f"{key}={value!r}: known are {', '.join(table)}")
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
