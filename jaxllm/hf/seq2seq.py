"""The families of encoder-decoders: T5 (1.0 and 1.1), BART and Marian. The entries are data, in seq2seq.yaml."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from jaxllm.hf.checkpoint import Tensors
from jaxllm.hf.fields import Fields, Vocabulary, entries
from jaxllm.hf.rows import rows_of, sizes_of
from jaxllm.hf.table import Row, names
from jaxllm.layers.config import FfnConfig, Gated, Plain
from jaxllm.models.seq2seq_config import Seq2SeqConfig

Found = dict[str, Any]  # {field of Seq2SeqConfig: value}, of nested ones as "encoder.norm.eps"
T5_FFN: Mapping[str, FfnConfig] = {
    "relu": Plain(activation="relu"), "gated-gelu": Gated(activation="gelu_tanh"), "gated-silu": Gated(),
    "gated-relu": Gated(activation="relu"),
}  # fmt: skip


class Seq2SeqFamily(NamedTuple):
    """A model_type of transformers.

    Attributes:
      architecture: its class. words: what it says as everyone does. tensors, copies, buffers: see seq2seq.yaml.
    """

    model_type: str
    architecture: str
    words: Vocabulary
    tensors: Mapping[str, str]
    copies: Mapping[str, str]
    buffers: Sequence[str] = ()

    def parse(self, raw: Mapping[str, Any], name: str, tensors: Collection[str] = ()) -> Seq2SeqConfig:
        """Return the architecture that a config.json describes; errors as of `Fields.finish`, which call it `name`.

        Args:
          tensors: names in the checkpoint; T5's config.json does not always say whether the head is tied.
        """
        fields = Fields(raw)
        fields.expect("is_encoder_decoder", True)
        fields.expect("architectures", [self.architecture])
        found = _halves(self.words.read(fields))
        found |= _read_t5(fields, found, tensors) if self.model_type == "t5" else _read_bart(fields, found)
        if found["encoder.n_heads"] != found["decoder.n_heads"]:
            fields.problems.append("encoder and decoder have different numbers of heads: only equal ones are read")
        # The first token of a target: named, or padding (T5, Marian), or the end (BART).
        absent = ("eos_token_id", 2) if self.model_type == "bart" else ("pad_token_id", 0)
        start = fields.take("decoder_start_token_id", like=0)
        found["start_token"] = fields.take(*absent) if start is None else start
        return fields.build(Seq2SeqConfig, found, self.words.keys, name)

    def write(self, config: Seq2SeqConfig) -> dict[str, Any]:
        """Return the config.json of an architecture.

        Raises:
          ValueError, KeyError: this family has no words for something in it.
        """
        found = flatten_dict(config.explicit().model_dump(), sep=".")
        both = {f"both.{field[8:]}": value for field, value in found.items() if field.startswith("decoder.")}
        head = {"architectures": [self.architecture], "model_type": self.model_type, "is_encoder_decoder": True}
        scaled = {"scale_embedding": config.decoder.embed_scale is not None}
        own = _write_t5(config) if self.model_type == "t5" else scaled
        return head | self.words.write(found | both) | own | {"decoder_start_token_id": config.start_token}

    def rows(self, config: Seq2SeqConfig) -> list[Row]:
        """Return where each parameter is in the checkpoint."""
        gated = isinstance(config.decoder.ffn, Gated)
        tensors = {ours: name if gated else name.replace("wi_1", "wi") for ours, name in self.tensors.items()}
        bias = [Row("logit_bias", "final_logits_bias", "one vocab -> (one vocab)")] if config.logit_bias else []
        return rows_of(tensors, config, also=bias)

    def open(self, checkpoint: Tensors, config: Seq2SeqConfig) -> Tensors:
        """Return the checkpoint under the table's names, without constants; errors as of `Tensors.under`."""
        wanted = {name for row in self.rows(config) for name in names(row, sizes_of(config))}
        bare = lambda name: name.removeprefix("model.")  # as files saved from the model without its head have it
        table = next(iter(self.copies.values()))
        copies = {"lm_head.weight": table} | self.copies | {bare(copy): name for copy, name in self.copies.items()}
        copies = {copy: name for copy, name in copies.items() if copy not in wanted}
        constants = "|".join(re.escape(bare(name)) for name in self.buffers) or "$"
        return checkpoint.under(wanted, first="model", copies=copies, ignored=constants)


def _halves(found: Found) -> Found:
    """Write a field of both halves out for either."""
    of = lambda field: ("encoder", "decoder") if field.startswith("both.") else ("",)
    named = lambda field, half: field.replace("both", half, 1) if half else field
    return {named(field, half): value for field, value in found.items() for half in of(field)}


def _read_t5(fields: Fields, found: Found, tensors: Collection[str]) -> Found:
    named = fields.take("tie_word_embeddings", True)
    scaled = fields.take("scale_decoder_outputs", named)
    # transformers 5 writes that the head is tied also where it is not.
    tied = named and (scaled or "lm_head.weight" not in tensors)
    ffn = fields.among("feed_forward_proj", T5_FFN, "relu")
    return _halves({"both.ffn": ffn, "both.tie_embeddings": tied}) | {
        "logit_scale": found["decoder.d_model"] ** -0.5 if scaled else None,
        "decoder.n_layers": found["encoder.n_layers"] if (own := found["decoder.n_layers"]) is None else own,
    }


def _write_t5(config: Seq2SeqConfig) -> dict[str, Any]:
    return {
        "feed_forward_proj": {ffn: name for name, ffn in T5_FFN.items()}[config.decoder.ffn],
        "tie_word_embeddings": config.tie_embeddings, "scale_decoder_outputs": config.logit_scale is not None,
    }  # fmt: skip


def _read_bart(fields: Fields, found: Found) -> Found:
    fields.expect("decoder_vocab_size", found["decoder.vocab_size"])
    scaled = fields.take("scale_embedding", False)
    if found["decoder.positions.kind"] == "sinusoids":
        # Published files of Marian speak of norms of embeddings and of no sinusoids; the model never listened.
        for key in ("add_bias_logits", "extra_pos_embeddings", "normalize_embedding", "static_position_embeddings"):
            fields.take(key)
    return _halves({"both.embed_scale": found["decoder.d_model"] ** 0.5 if scaled else None})


SEQ2SEQ: Mapping[str, Seq2SeqFamily] = {
    name: Seq2SeqFamily(name, words=Vocabulary.of(entry), **entry) for name, entry in entries("seq2seq.yaml").items()
}
