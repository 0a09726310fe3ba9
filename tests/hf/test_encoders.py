"""Encoders against transformers: logits, padding, loss, gradients, and back again through an export."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.batch import Batch, LabelledTexts
from jaxllm.core.tree import named_leaves
from jaxllm.hf.checkpoint import Checkpoint, Writer
from jaxllm.hf.encoders import ENCODERS
from jaxllm.hf.table import names, take
from jaxllm.hf.weights import read_params, sizes_of, write_params
from jaxllm.huggingface import words_for
from jaxllm.models.build import bind, graph
from jaxllm.models.config import ComputeConfig
from jaxllm.models.encoder_config import Embeddings
from jaxllm.training.objectives import loss_sums

WHY = "pip install 'jaxllm[parity]' compares with transformers and torch"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

SIZES = {
    "vocab_size": 288, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80,
    "max_position_embeddings": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
LABELS = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
MODELS = {
    "bert-tokens": ("Bert", "ForMaskedLM", {"hidden_act": "gelu_new"}),
    "bert-untied": ("Bert", "ForMaskedLM", {"tie_word_embeddings": False}),
    "bert-labels": ("Bert", "ForSequenceClassification", LABELS),
    "bert-vectors": ("Bert", "Model", {"layer_norm_eps": 1e-6}),
    "roberta-tokens": ("Roberta", "ForMaskedLM", {"hidden_act": "relu", "type_vocab_size": 1}),
    "roberta-labels": ("Roberta", "ForSequenceClassification", {**LABELS, "pad_token_id": 2}),
    "roberta-vectors": ("Roberta", "Model", {}),
}
GRADIENTS = ("bert-tokens", "bert-labels", "roberta-tokens")
COMPUTE = ComputeConfig(dtype="float32", layers="scan", loss_chunk=8)


def build(kind, head, fields, path):
    """Return a model of transformers, every bias and norm off its trivial value, saved to `path`."""
    config = getattr(transformers, f"{kind}Config")(**SIZES | fields)
    torch.manual_seed(0)
    model = getattr(transformers, kind + head)._from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            norm = "norm" in name.lower()
            start = float(norm and name.endswith("weight"))
            weight.copy_(start + (0.2 if norm or name.endswith("bias") else 0.12) * torch.randn_like(weight))
    model.save_pretrained(path)
    return model


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder")
    return request.param, build(*MODELS[request.param], path), path


def ours(path):
    raw = json.loads((path / "config.json").read_text())
    family, checkpoint = ENCODERS[raw["model_type"]], Checkpoint(path)
    config = family.parse(raw, str(path), checkpoint)
    return family, config, read_params(family.open(checkpoint, config), family.rows(config), config)


def batch(config):
    """Return (tokens, types, mask): the second row is padded on the right, the third on the left."""
    generator = np.random.default_rng(0)
    tokens, types = generator.integers(3, 288, (3, 24)), generator.integers(0, config.n_types, (3, 24))
    mask = np.ones((3, 24), int)
    mask[1, 17:], mask[2, :7] = 0, 0
    pad = max(config.stack.positions.offset - 1, 0)
    return np.where(mask, tokens, pad), np.where(mask, types, 0), mask


def positions(mask):
    return np.clip(np.cumsum(mask, 1) - 1, 0, None)


def theirs(model, tokens, types, mask):
    """Run transformers; RoBERTa counts positions itself, BERT has to be told about padding on the left."""
    inputs = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types}
    if model.config.model_type == "bert":
        inputs["position_ids"] = positions(mask)
    return model(**{key: torch.from_numpy(np.asarray(value, np.int64)) for key, value in inputs.items()})


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_hidden_states_logits_and_padding(pair):
    _, model, path = pair
    _, config, params = ours(path)
    tokens, types, mask = batch(config)
    real = mask.astype(bool)
    vectors = isinstance(config.head, Embeddings)

    @jax.jit
    def run(params, tokens, *rows):
        module = bind(graph(config, COMPUTE)[0], params)
        hidden = module.states(tokens, *rows)
        return hidden, (module.pooled if vectors else module.logits)(hidden, rows[0])

    rows = (jnp.asarray(each) for each in (tokens, mask, types, positions(mask)))
    hidden, logits = (np.asarray(each) for each in run(params, *rows))
    with torch.no_grad():
        found = theirs(model.base_model, tokens, types, mask).last_hidden_state.numpy()
        close(hidden[real], found[real])
        if vectors:
            close(logits[:2], theirs(model, tokens[:2], types[:2], mask[:2]).pooler_output.numpy())
        elif logits.ndim == 3:
            close(logits[real], theirs(model, tokens, types, mask).logits.numpy()[real])
        else:  # transformers takes column 0 for the first token, so its third row goes in without padding
            close(logits[:2], theirs(model, tokens[:2], types[:2], mask[:2]).logits.numpy())
            close(logits[2:], theirs(model, tokens[2:, 7:], types[2:, 7:], mask[2:, 7:]).logits.numpy())


def test_loss_and_gradients(pair):
    name, model, path = pair
    if name not in GRADIENTS:
        return  # nothing in it that the others have not
    family, config, params = ours(path)
    tokens, types, mask = (x[:2] for x in batch(config))
    targets = np.random.default_rng(1).integers(3, 288, tokens.shape)
    weights = (np.random.default_rng(2).random(tokens.shape) < 0.3) * mask
    labels = np.array([2, 0]) if config.head.kind == "classes" else np.where(weights, targets, -100)
    inputs = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": 0 * types, "labels": labels}
    out = model(**{key: torch.from_numpy(np.asarray(value, np.int64)) for key, value in inputs.items()})
    model.zero_grad()
    out.loss.backward()

    def loss(params):
        if config.head.kind == "classes":
            rows = LabelledTexts(tokens, mask, labels, np.ones(2, np.float32))
            return loss_sums(params, rows, config, COMPUTE)[0] / 2
        rows = Batch(tokens, targets, weights.astype(np.float32), mask, positions(mask))
        return loss_sums(params, rows, config, COMPUTE)[0] / weights.sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, out.loss.item(), rtol=1e-5)
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    leaves = named_leaves(gradient)
    checked = 0
    for row in family.rows(config):
        for layer, name in enumerate(names(row, sizes_of(config))):
            name = name if name in expected else name.replace("decoder.bias", "bias")
            wanted = take(row, expected[name].numpy(), sizes_of(config))
            found = np.asarray(leaves[row.ours][layer] if "{layer}" in row.theirs else leaves[row.ours])
            assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max() + 1e-7, row.ours
            checked += 1
    assert checked == len(expected)


def test_the_export_is_the_inverse(pair, tmp_path):
    name, model, path = pair
    family, config, params = ours(path)
    found, description = words_for(config)
    assert found is family
    writer = Writer(tmp_path, max_bytes=60_000)
    write_params(params, family.rows(config), config, writer)
    writer.close()
    (tmp_path / "config.json").write_text(json.dumps(description))
    before, after = Checkpoint(path), Checkpoint(tmp_path)
    unread = {"cls.predictions.bias"} if name == "bert-untied" else set()
    assert set(after) == set(before) - unread
    for tensor in after:
        np.testing.assert_array_equal(after[tensor], before[tensor])
    assert ours(tmp_path)[1] == config
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager").float().eval()
    inputs = batch(config)
    with torch.no_grad():
        for one, other in zip(theirs(model, *inputs).to_tuple(), theirs(again, *inputs).to_tuple(), strict=True):
            np.testing.assert_array_equal(one.numpy(), other.numpy())


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_key_that_is_left_out_means_what_transformers_takes_it_for(name):
    kind = transformers.CONFIG_MAPPING[name]
    required = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                "max_position_embeddings", "architectures"}  # fmt: skip
    full = kind().to_dict() | {"architectures": [f"{ENCODERS[name].title}ForMaskedLM"]}
    for key in set(full) - required:
        raw = {each: value for each, value in full.items() if each != key}
        again = kind.from_dict(json.loads(json.dumps(raw))).to_dict() | {"architectures": full["architectures"]}
        assert ENCODERS[name].parse(raw, "without") == ENCODERS[name].parse(again, "with"), key
