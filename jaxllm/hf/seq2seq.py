"""The families of encoder-decoders: T5 (1.0 and 1.1), BART and Marian, which share BART's layout."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from jaxllm.hf.checkpoint import Checkpoint
from jaxllm.hf.families import ACTIVATIONS, NAMES
from jaxllm.hf.fields import Fields
from jaxllm.hf.renamed import Renamed, without_copies
from jaxllm.hf.rows import KEYS, QUERIES, linear, norm_rows
from jaxllm.hf.table import Row
from jaxllm.layers.config import Gated, LayerNorm, Learned, Plain, RelativeBias, RMSNorm, Sinusoids
from jaxllm.models.config import ModelConfig
from jaxllm.models.seq2seq_config import Seq2SeqConfig

# Dropout, what generation is asked for (generation_config.json has it), heads that are not read, and how T5 is drawn.
HARMLESS = (
    "activation_dropout", "decoder_layerdrop", "decoder_start_token_id", "dropout", "dropout_rate", "early_stopping",
    "encoder_layerdrop", "force_bos_token_to_be_generated", "forced_bos_token_id", "forced_eos_token_id",
    "initializer_factor", "length_penalty", "max_length", "min_length", "n_positions", "no_repeat_ngram_size",
    "num_beams", "num_hidden_layers", "num_labels", "classif_dropout", "output_past", "gradient_checkpointing",
)  # fmt: skip
T5_FFN = {
    "relu": Plain(activation="relu"), "gated-gelu": Gated(activation="gelu_tanh"), "gated-silu": Gated(),
    "gated-relu": Gated(activation="relu"),
}  # fmt: skip
T5_DISTANCES = (("num_buckets", 32), ("max_distance", 128))
T5_LONGEST = 32768  # distances have no end; a bound for buckets of shapes
OFFSET = 2  # BART's table of positions begins two rows early


class Seq2SeqFamily(NamedTuple):
    """A model_type of transformers.

    Attributes:
      copies: names under which files repeat a tensor, and that tensor's; buffers: constants that files have.
    """

    model_type: str
    architecture: str
    copies: Mapping[str, str]
    buffers: tuple[str, ...] = ()

    def parse(self, raw: Mapping[str, Any], name: str, tensors: Collection[str] = ()) -> Seq2SeqConfig:
        """Return the architecture that a config.json describes.

        Args:
          name: what errors call it.
          tensors: names in the checkpoint; T5's config.json does not always say whether the head is tied.
        Raises:
          ValueError: something in it is not understood; the message lists everything.
        """
        fields = Fields(raw)
        for key in HARMLESS:
            fields.take(key)
        fields.expect("is_encoder_decoder", True)
        fields.expect("architectures", [self.architecture])
        config = _read_t5(fields, tensors) if self.model_type == "t5" else _read_bart(fields, self.model_type)
        fields.finish(name)
        return config

    def write(self, config: Seq2SeqConfig) -> dict[str, Any]:
        """Return the config.json of an architecture."""
        head = {"architectures": [self.architecture], "model_type": self.model_type, "is_encoder_decoder": True}
        body = _write_t5(config) if self.model_type == "t5" else _write_bart(config)
        ids = {"vocab_size": config.vocab_size, "decoder_start_token_id": config.start_token}
        return head | body | ids

    def open(self, checkpoint: Checkpoint, _config: Seq2SeqConfig) -> Renamed:
        """Return the checkpoint without copies and constants."""
        bare = lambda name: name.removeprefix("model.")  # as files saved without the head have it
        buffers = {*self.buffers, *map(bare, self.buffers)}
        there = {name: name for name in checkpoint if name not in buffers}
        copies = dict(self.copies) | {bare(copy): bare(original) for copy, original in self.copies.items()}
        return Renamed(checkpoint, without_copies(checkpoint, there, copies))

    def rows(self, config: Seq2SeqConfig) -> list[Row]:
        """Return where each parameter is in the checkpoint."""
        return list(_t5_rows(config) if self.model_type == "t5" else _bart_rows(config))


def _stacks(shared: dict[str, Any], sizes: dict[str, tuple[int, int]], **rest: Any) -> Seq2SeqConfig:
    """Return two stacks that differ in `sizes` alone: {field: (encoder's, decoder's)}."""
    halves = (ModelConfig(**shared, **{name: pair[i] for name, pair in sizes.items()}) for i in range(2))
    return Seq2SeqConfig(encoder=next(halves), decoder=next(halves), **rest)


def _read_t5(fields: Fields, tensors: Collection[str]) -> Seq2SeqConfig:
    named = fields.take("tie_word_embeddings", True)
    scaled = fields.take("scale_decoder_outputs", named)
    tied = named and (scaled or "lm_head.weight" not in tensors)
    for key in ("dense_act_fn", "is_gated_act"):  # follow from feed_forward_proj
        fields.take(key)
    buckets, reach = (fields.take(f"relative_attention_{name}", value) for name, value in T5_DISTANCES)
    d_model, n_layers = fields.need("d_model"), fields.need("num_layers")
    shared = {
        "vocab_size": fields.need("vocab_size"), "d_model": d_model, "n_heads": fields.need("num_heads"),
        "head_dim": fields.need("d_kv"), "d_ff": fields.need("d_ff"), "max_seq_len": T5_LONGEST, "score_scale": 1.0,
        "norm": RMSNorm(eps=fields.take("layer_norm_epsilon", 1e-6)), "tie_embeddings": tied,
        "ffn": fields.among("feed_forward_proj", T5_FFN, "relu"),
        "positions": RelativeBias(buckets=buckets, max_distance=reach),
    }  # fmt: skip
    layers = {"n_layers": (n_layers, fields.take("num_decoder_layers", n_layers))}
    start = fields.take("decoder_start_token_id", fields.take("pad_token_id", 0))
    return _stacks(shared, layers, start_token=start, logit_scale=d_model**-0.5 if scaled else None)


def _write_t5(config: Seq2SeqConfig) -> dict[str, Any]:
    stack, scaled = config.decoder, config.logit_scale is not None
    return {
        "d_model": stack.d_model, "d_kv": stack.head_width, "d_ff": stack.d_ff, "num_heads": stack.n_heads,
        "num_layers": config.encoder.n_layers, "num_decoder_layers": stack.n_layers,
        "relative_attention_num_buckets": stack.positions.buckets,
        "relative_attention_max_distance": stack.positions.max_distance, "layer_norm_epsilon": stack.norm.eps,
        "feed_forward_proj": next(name for name, ffn in T5_FFN.items() if ffn == stack.ffn),
        "tie_word_embeddings": stack.tie_embeddings, "scale_decoder_outputs": scaled,
    }  # fmt: skip


def _read_bart(fields: Fields, model_type: str) -> Seq2SeqConfig:
    bart = model_type == "bart"
    fields.expect("normalize_before", False)
    fields.expect(
        "normalize_embedding", bart, *([] if bart else [True])
    )  # Marian's files say so, and have no such norm
    fields.expect("add_final_layer_norm", False)
    fields.expect("add_bias_logits", False, True)
    fields.expect("static_position_embeddings", not bart, *([] if bart else [False]))
    fields.expect("extra_pos_embeddings", OFFSET, *([] if bart else [fields.take("pad_token_id", 0) + 1]))
    fields.expect("share_encoder_decoder_embeddings", True)
    fields.expect("tie_word_embeddings", True)
    vocab_size, d_model = fields.need("vocab_size"), fields.need("d_model")
    fields.expect("decoder_vocab_size", vocab_size)
    sizes = {
        ours: tuple(fields.need(f"{half}_{theirs}") for half in ("encoder", "decoder"))
        for ours, theirs in (("n_layers", "layers"), ("n_heads", "attention_heads"), ("d_ff", "ffn_dim"))
    }
    if len(set(sizes["n_heads"])) > 1:
        fields.problems.append(f"encoder and decoder have {sizes['n_heads']} heads: only equal numbers are read")
    shared = {
        "vocab_size": vocab_size, "d_model": d_model, "max_seq_len": fields.take("max_position_embeddings", 1024),
        "norm": LayerNorm(), "norm_placement": "post", "embed_norm": bart, "bias": True, "tie_embeddings": True,
        "positions": Learned(offset=OFFSET) if bart else Sinusoids(interleaved=False),
        "ffn": Plain(activation=fields.among("activation_function", ACTIVATIONS, "gelu")),
        "embed_scale": d_model**0.5 if fields.take("scale_embedding", False) else None,
        "init_std": fields.take("init_std", 0.02),
    }  # fmt: skip
    start = fields.take("decoder_start_token_id", 2 if bart else fields.take("pad_token_id", 58100))
    return _stacks(shared, sizes, start_token=start, logit_bias=True)


def _write_bart(config: Seq2SeqConfig) -> dict[str, Any]:
    written = {
        f"{half}_{theirs}": getattr(getattr(config, half), ours)
        for half in ("encoder", "decoder")
        for ours, theirs in (("n_layers", "layers"), ("n_heads", "attention_heads"), ("d_ff", "ffn_dim"))
    }
    stack = config.decoder
    return written | {
        "d_model": stack.d_model, "max_position_embeddings": stack.max_seq_len, "init_std": stack.init_std,
        "scale_embedding": stack.embed_scale is not None, "activation_function": NAMES[stack.ffn.activation],
        "tie_word_embeddings": True,
    }  # fmt: skip


def _attention(ours: str, theirs: str, names: str, *, bias: bool) -> Iterator[Row]:
    for name, spelled in zip("qkvo", names.split(), strict=True):
        inputs, outputs = (QUERIES, "embed") if name == "o" else ("embed", QUERIES if name == "q" else KEYS)
        yield from linear(f"{ours}/{name}", f"{theirs}.{spelled}", inputs, outputs, bias=bias)


def _t5_rows(config: Seq2SeqConfig) -> Iterator[Row]:
    yield Row("decoder/embed/table", "shared.weight", "vocab embed -> vocab embed")
    if not config.tie_embeddings:
        yield Row("decoder/head", "lm_head.weight", "vocab embed -> vocab embed")
    for half, parts in (("encoder", ("attention", "ffn")), ("decoder", ("attention", "cross", "ffn"))):
        stack, blocks, layer = getattr(config, half), f"{half}/blocks", f"{half}.block.{{{half}}}.layer"
        table = f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield Row(f"{half}/relative/table", table, "buckets heads -> buckets heads")
        yield from norm_rows(stack, f"{half}/final_norm", f"{half}.final_layer_norm")
        for index, part in enumerate(parts):
            yield from norm_rows(stack, f"{blocks}/{part}_norm", f"{layer}.{index}.layer_norm")
        yield from _attention(f"{blocks}/attention", f"{layer}.0.SelfAttention", "q k v o", bias=False)
        if half == "decoder":
            yield from _attention(f"{blocks}/cross_attention", f"{layer}.1.EncDecAttention", "q k v o", bias=False)
        dense, gated = f"{layer}.{len(parts) - 1}.DenseReluDense", isinstance(stack.ffn, Gated)
        for ours, theirs in (("gate", "wi_0"), ("up", "wi_1")) if gated else (("up", "wi"),):
            yield from linear(f"{blocks}/ffn/{ours}", f"{dense}.{theirs}", "embed", "mlp", bias=False)
        yield from linear(f"{blocks}/ffn/down", f"{dense}.wo", "mlp", "embed", bias=False)


def _bart_rows(config: Seq2SeqConfig) -> Iterator[Row]:
    yield Row("decoder/embed/table", "model.shared.weight", "vocab embed -> vocab embed")
    yield Row("logit_bias", "final_logits_bias", "one vocab -> (one vocab)")
    for half in ("encoder", "decoder"):
        stack, blocks, layer = getattr(config, half), f"{half}/blocks", f"model.{half}.layers.{{{half}}}"
        if isinstance(stack.positions, Learned):
            table = f"model.{half}.embed_positions.weight"
            yield Row(f"{half}/position_embed/table", table, "length embed -> length embed")
        if stack.embed_norm:
            yield from norm_rows(stack, f"{half}/embed_norm", f"model.{half}.layernorm_embedding")
        projections = "q_proj k_proj v_proj out_proj"
        yield from _attention(f"{blocks}/attention", f"{layer}.self_attn", projections, bias=True)
        yield from norm_rows(stack, f"{blocks}/attention_out_norm", f"{layer}.self_attn_layer_norm")
        if half == "decoder":
            yield from _attention(f"{blocks}/cross_attention", f"{layer}.encoder_attn", projections, bias=True)
            yield from norm_rows(stack, f"{blocks}/cross_out_norm", f"{layer}.encoder_attn_layer_norm")
        yield from linear(f"{blocks}/ffn/up", f"{layer}.fc1", "embed", "mlp", bias=True)
        yield from linear(f"{blocks}/ffn/down", f"{layer}.fc2", "mlp", "embed", bias=True)
        yield from norm_rows(stack, f"{blocks}/ffn_out_norm", f"{layer}.final_layer_norm")


_T5_COPIES = {f"{half}.embed_tokens.weight": "shared.weight" for half in ("encoder", "decoder")}
_BART_COPIES = {f"model.{name}": "model.shared.weight" for name in _T5_COPIES}
_SINUSOIDS = tuple(f"model.{half}.embed_positions.weight" for half in ("encoder", "decoder"))

SEQ2SEQ: Mapping[str, Seq2SeqFamily] = {
    family.model_type: family
    for family in (
        # A cross-attention bias that the first T5 files have and no version of the model reads.
        Seq2SeqFamily(
            "t5", "T5ForConditionalGeneration", _T5_COPIES,
            ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
        ),
        Seq2SeqFamily("bart", "BartForConditionalGeneration", _BART_COPIES),
        Seq2SeqFamily("marian", "MarianMTModel", _BART_COPIES, _SINUSOIDS),
    )
}  # fmt: skip


def describe(config: Seq2SeqConfig) -> tuple[Seq2SeqFamily, dict[str, Any]]:
    """Return the family that computes an architecture and its config.json.

    Raises:
      ValueError: there is none.
    """
    halves = lambda config: (config.encoder.explicit(), config.decoder.explicit())
    meaning = lambda config: (*halves(config), config.logit_scale, config.logit_bias)
    head = () if config.tie_embeddings else ("lm_head.weight",)
    for family in SEQ2SEQ.values():
        try:
            written = family.write(config)
            again = family.parse(written, family.model_type, head)
        except (ValueError, KeyError, AttributeError, StopIteration):
            continue
        if meaning(again) == meaning(config):
            return family, written
    raise ValueError(
        f"no family of transformers computes this encoder-decoder; known are {', '.join(SEQ2SEQ)}: {config}"
    )
