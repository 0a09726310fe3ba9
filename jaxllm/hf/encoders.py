"""The families of encoders: BERT and RoBERTa, each with a head for tokens, for labels, or with none."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from jaxllm.hf.checkpoint import Checkpoint
from jaxllm.hf.families import ACTIVATIONS, NAMES
from jaxllm.hf.fields import Fields
from jaxllm.hf.renamed import Renamed, without_copies
from jaxllm.hf.rows import KEYS, QUERIES, linear, norm_rows
from jaxllm.hf.table import Row
from jaxllm.layers.config import LayerNorm, Learned, Plain
from jaxllm.models.config import ModelConfig
from jaxllm.models.encoder_config import Classes, Embeddings, EncoderConfig, HeadConfig, MaskedLM

# Of Google's own checkpoints: a pooler that was never built otherwise, and a direction that an encoder does not have.
MEANINGLESS = (
    "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head",
    "pooler_type", "attention_probs_dropout_prob", "hidden_dropout_prob", "output_past", "num_labels",
)  # fmt: skip
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")  # constants that old files have
SPELLED = NAMES | {"gelu_tanh": "gelu_new"}  # as encoders usually spell it
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
TRUNK = ("embeddings.", "encoder.", "pooler.")  # parts of the model below its head


class EncoderFamily(NamedTuple):
    """A model_type of transformers.

    Attributes:
      model_type: also the first word of its tensors' names; title: first word of its classes' names.
      behind_pad: positions begin at pad_token_id + 1 (RoBERTa).
      gelu: the masked-LM head has its own activation, gelu (RoBERTa), not that of the blocks.
      lm: the masked-LM head's dense layer, norm, bias and output matrix.
      labels: the dense layer and the output layer of the head for labels.
      surplus: what checkpoints carry over from pretraining and no head here reads.
    """

    model_type: str
    title: str
    behind_pad: bool
    gelu: bool
    lm: tuple[str, str, str, str]
    labels: tuple[str, str]
    surplus: tuple[str, ...]

    def parse(self, raw: Mapping[str, Any], name: str, tensors: Collection[str] = ()) -> EncoderConfig:
        """Return the architecture that a config.json describes.

        Args:
          name: what errors call it.
          tensors: names in the checkpoint; whether there is a pooler, config.json does not say.
        Raises:
          ValueError: something in it is not understood; the message lists everything.
        """
        fields = Fields(raw)
        for key in MEANINGLESS:
            fields.take(key)
        fields.expect("position_embedding_type", "absolute")
        fields.expect("is_decoder", False)
        fields.expect("add_cross_attention", False)
        pooler = any(tensor.endswith("pooler.dense.weight") for tensor in tensors)
        head = self._read_head(fields, pooler)
        offset = fields.take("pad_token_id", 1) + 1 if self.behind_pad else 0
        n_types = fields.take("type_vocab_size", 2)
        stack = _read_stack(fields, offset)
        fields.finish(name)
        return EncoderConfig(stack=stack, n_types=n_types, head=head)

    def _read_head(self, fields: Fields, pooler: bool) -> HeadConfig:
        heads = {f"{self.title}ForMaskedLM", f"{self.title}ForSequenceClassification", f"{self.title}Model"}
        architecture = (fields.take("architectures") or [None])[0]
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
        if (offset > 0) != self.behind_pad or not isinstance(stack.ffn, Plain):
            raise ValueError(f"{self.model_type} counts positions from elsewhere, or has no gated feed-forward layer")
        kind = {"masked_lm": "ForMaskedLM", "classes": "ForSequenceClassification", "embeddings": "Model"}[head.kind]
        written = {
            "architectures": [self.title + kind], "model_type": self.model_type, "vocab_size": stack.vocab_size,
            "hidden_size": stack.d_model, "num_hidden_layers": stack.n_layers, "num_attention_heads": stack.n_heads,
            "intermediate_size": stack.d_ff, "hidden_act": SPELLED[stack.ffn.activation],
            "layer_norm_eps": stack.norm.eps, "max_position_embeddings": stack.max_seq_len + offset,
            "type_vocab_size": config.n_types, "tie_word_embeddings": stack.tie_embeddings,
            "initializer_range": stack.init_std,
        }  # fmt: skip
        if self.behind_pad:
            written["pad_token_id"] = offset - 1
        if isinstance(head, Classes):
            written["id2label"] = {str(index): label for index, label in enumerate(head.labels)}
            written["label2id"] = {label: index for index, label in enumerate(head.labels)}
            written["problem_type"] = head.problem
        return written

    def rows(self, config: EncoderConfig) -> list[Row]:
        """Return where each parameter is in the checkpoint."""
        # Files of a model without a head have its tensors without the first word.
        prefix = "" if isinstance(config.head, Embeddings) else f"{self.model_type}."
        return [*_stack_rows(config, prefix), *self._head_rows(config, prefix)]

    def _head_rows(self, config: EncoderConfig, prefix: str) -> Iterator[Row]:
        dense = lambda ours, theirs: linear(ours, theirs, "inputs", "outputs", bias=True)
        match config.head:
            case MaskedLM():
                transform, norm, bias, matrix = self.lm
                yield from dense("head/dense", transform)
                yield from norm_rows(config.stack, "head/norm", norm)
                if not config.tie_embeddings:
                    yield Row("stack/head", f"{matrix}.weight", "vocab embed -> vocab embed")
                yield Row("head/bias", bias if config.tie_embeddings else f"{matrix}.bias", "vocab -> vocab")
            case Classes():
                yield from dense("head/pooler/dense", self.labels[0])
                yield from dense("head/out", self.labels[1])
            case Embeddings(pooler=True):
                yield from dense("head/dense", f"{prefix}pooler.dense")

    def open(self, checkpoint: Checkpoint, config: EncoderConfig) -> Renamed:
        """Return the checkpoint under the table's names.

        Old spellings (gamma and beta of norms, a missing or surplus first word) are translated; constants, copies of
        tied tensors and what other heads left behind are dropped.

        Raises:
          ValueError: a copy differs from the tensor that it is tied to, or two tensors have one name.
        """
        renamed: dict[str, str] = {}
        for stored in checkpoint:
            name = self._canonical(stored, config)
            if name in renamed:
                raise ValueError(f"{checkpoint.directory} has {name} twice: {renamed[name]} and {stored}; remove one")
            renamed[name] = stored
        wanted = {row.theirs for row in self.rows(config)}
        renamed = without_copies(checkpoint, renamed, self._copies(config), wanted)
        dropped = [*BUFFERS, *self._surplus(config)]
        kept = {
            name: stored for name, stored in renamed.items()
            if name in wanted or not name.removeprefix(f"{self.model_type}.").startswith(tuple(dropped))
        }  # fmt: skip
        return Renamed(checkpoint, kept)

    def _canonical(self, name: str, config: EncoderConfig) -> str:
        for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
            if name.endswith(old):
                name = name.removesuffix(old) + new
        bare = name.removeprefix(f"{self.model_type}.")
        below = bare.startswith(TRUNK) and not isinstance(config.head, Embeddings)
        return f"{self.model_type}.{bare}" if below else bare

    def _copies(self, config: EncoderConfig) -> dict[str, str]:
        """Return {name of a copy: name of the tensor it is tied to}."""
        if not isinstance(config.head, MaskedLM) or not config.tie_embeddings:
            return {}
        _, _, bias, matrix = self.lm
        table = f"{self.model_type}.embeddings.word_embeddings.weight"
        return {f"{matrix}.weight": table, f"{matrix}.bias": bias}

    def _surplus(self, config: EncoderConfig) -> tuple[str, ...]:
        if isinstance(config.head, Embeddings):
            return ()
        # Untied, the output matrix has a bias of its own, and transformers saves the other one without reading it.
        unread = (self.lm[2],) if isinstance(config.head, MaskedLM) and not config.tie_embeddings else ()
        return (*self.surplus, *unread)


def _read_stack(fields: Fields, offset: int) -> ModelConfig:
    """Return the blocks and their tables, which both families describe alike."""
    return ModelConfig(
        vocab_size=fields.need("vocab_size"), d_model=fields.need("hidden_size"),
        n_layers=fields.need("num_hidden_layers"), n_heads=fields.need("num_attention_heads"),
        d_ff=fields.need("intermediate_size"), max_seq_len=fields.need("max_position_embeddings") - offset,
        norm=LayerNorm(eps=fields.take("layer_norm_eps", 1e-12)), norm_placement="post", embed_norm=True,
        positions=Learned(offset=offset),
        ffn=Plain(activation=fields.among("hidden_act", ACTIVATIONS, "gelu")), bias=True,
        tie_embeddings=fields.take("tie_word_embeddings", True), init_std=fields.take("initializer_range", 0.02),
    )  # fmt: skip


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


def _stack_rows(config: EncoderConfig, prefix: str) -> Iterator[Row]:
    """Yield the rows below the head."""
    embeddings, layer, blocks = f"{prefix}embeddings", f"{prefix}encoder.layer.{{layer}}", "stack/blocks"
    yield Row("stack/embed/table", f"{embeddings}.word_embeddings.weight", "vocab embed -> vocab embed")
    order = "length embed -> length embed"
    yield Row("stack/position_embed/table", f"{embeddings}.position_embeddings.weight", order)
    yield Row("type_embed/table", f"{embeddings}.token_type_embeddings.weight", "types embed -> types embed")
    yield from norm_rows(config.stack, "stack/embed_norm", f"{embeddings}.LayerNorm")
    for ours, theirs, outputs in (("q", "query", QUERIES), ("k", "key", KEYS), ("v", "value", KEYS)):
        yield from linear(f"{blocks}/attention/{ours}", f"{layer}.attention.self.{theirs}", "embed", outputs, bias=True)
    yield from linear(f"{blocks}/attention/o", f"{layer}.attention.output.dense", QUERIES, "embed", bias=True)
    yield from norm_rows(config.stack, f"{blocks}/attention_out_norm", f"{layer}.attention.output.LayerNorm")
    yield from linear(f"{blocks}/ffn/up", f"{layer}.intermediate.dense", "embed", "mlp", bias=True)
    yield from linear(f"{blocks}/ffn/down", f"{layer}.output.dense", "mlp", "embed", bias=True)
    yield from norm_rows(config.stack, f"{blocks}/ffn_out_norm", f"{layer}.output.LayerNorm")


ENCODERS: Mapping[str, EncoderFamily] = {
    family.model_type: family
    for family in (
        EncoderFamily(
            "bert", "Bert", behind_pad=False, gelu=False,
            lm=("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias",
                "cls.predictions.decoder"),
            labels=("bert.pooler.dense", "classifier"), surplus=("pooler.", "cls.seq_relationship."),
        ),
        EncoderFamily(
            "roberta", "Roberta", behind_pad=True, gelu=True,
            lm=("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder"),
            labels=("classifier.dense", "classifier.out_proj"), surplus=("pooler.",),
        ),
    )
}  # fmt: skip


def describe(config: EncoderConfig) -> tuple[EncoderFamily, dict[str, Any]]:
    """Return the family that computes an architecture and its config.json.

    Raises:
      ValueError: there is none.
    """
    tensors = ("pooler.dense.weight",) if isinstance(config.head, Embeddings) and config.head.pooler else ()
    for family in ENCODERS.values():
        try:
            written = family.write(config)
        except (ValueError, KeyError):
            continue
        again = family.parse(written, family.model_type, tensors)
        if _explicit(again) == _explicit(config):
            return family, written
    raise ValueError(f"no family of transformers computes this encoder; known are {', '.join(ENCODERS)}: {config}")


def _explicit(config: EncoderConfig) -> EncoderConfig:
    """What a configuration means, defaults written out."""
    return config.model_copy(update={"stack": config.stack.explicit()})
