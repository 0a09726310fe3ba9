"""Encoder-decoders against transformers: logits, padding, loss, gradients, generation, and back through an export."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.tree import named_leaves
from jaxllm.hf.checkpoint import Checkpoint, Writer
from jaxllm.hf.rows import sizes_of
from jaxllm.hf.seq2seq import SEQ2SEQ
from jaxllm.hf.table import names, take
from jaxllm.hf.weights import read_params, write_params
from jaxllm.huggingface import words_for
from jaxllm.inference.decode import Decoder, Limits, Request
from jaxllm.inference.sampling import Sampler
from jaxllm.inference.search import Search
from jaxllm.layers.config import RelativeBias
from jaxllm.layers.positions import relative_buckets
from jaxllm.models.build import bind, graph
from jaxllm.models.config import ComputeConfig

WHY = "pip install 'jaxllm[parity]' compares with transformers and torch"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

T5 = {
    "vocab_size": 288, "d_model": 48, "d_kv": 20, "d_ff": 80, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 12, "relative_attention_max_distance": 18, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": 288, "d_model": 48, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 80, "decoder_ffn_dim": 72, "max_position_embeddings": 40,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
}  # fmt: skip
MARIAN = {**BART, "pad_token_id": 3, "decoder_start_token_id": 3, "eos_token_id": 0, "forced_eos_token_id": None}
MODELS = {
    "t5": ("T5", "T5ForConditionalGeneration", T5),
    "t5-1.1": (
        "T5", "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": ("Bart", "BartForConditionalGeneration", {**BART, "scale_embedding": True, "forced_eos_token_id": None}),
    "marian": ("Marian", "MarianMTModel", {**MARIAN, "activation_function": "swish", "scale_embedding": True}),
}  # fmt: skip
COMPUTE = ComputeConfig(dtype="float32", layers="scan")


def build(kind, architecture, fields, path):
    """Return a model of transformers, every bias and norm off its trivial value, saved to `path`."""
    config = getattr(transformers, f"{kind}Config")(**fields)
    torch.manual_seed(0)
    model = getattr(transformers, architecture)._from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_positions" in name and kind == "Marian":
                continue  # constants
            norm = "norm" in name.lower()
            start = float(norm and name.endswith("weight"))
            weight.copy_(start + (0.2 if norm or name.endswith("bias") else 0.12) * torch.randn_like(weight))
        if "final_logits_bias" in dict(model.named_buffers()):
            model.final_logits_bias.copy_(torch.randn_like(model.final_logits_bias))
    model.save_pretrained(path)
    return model


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("seq2seq")
    return request.param, build(*MODELS[request.param], path), path


def ours(path):
    raw = json.loads((path / "config.json").read_text())
    family, checkpoint = SEQ2SEQ[raw["model_type"]], Checkpoint(path)
    config = family.parse(raw, str(path), checkpoint)
    return family, config, read_params(family.open(checkpoint, config), family.rows(config), config)


def batch():
    """Return (sources, mask, decoder inputs, labels): sources padded not at all, on the right, and on the left."""
    generator = np.random.default_rng(0)
    sources, targets = generator.integers(4, 288, (3, 22)), generator.integers(4, 288, (3, 12))
    mask = np.ones((3, 22), int)
    mask[1, 15:], mask[2, :6] = 0, 0
    labels = generator.integers(4, 288, (3, 12))
    labels[1, 9:] = -100
    return np.where(mask, sources, 1), mask, targets, labels


def nats(model, params, sources, mask, inputs, labels):
    """Return the mean loss of the labels that count."""
    logits = model(params)(jnp.asarray(sources), jnp.asarray(inputs), jnp.asarray(mask))
    counted = labels != -100
    chosen = jnp.take_along_axis(logits, jnp.where(counted, labels, 0)[..., None], -1)[..., 0]
    return jnp.sum((jax.nn.logsumexp(logits, -1) - chosen) * counted) / counted.sum()


def test_logits_loss_and_gradients_are_those_of_transformers(pair):
    kind, model, path = pair
    family, config, params = ours(path)
    sources, mask, inputs, labels = batch()
    if kind in ("bart", "marian"):
        mask[2], sources[2] = 1, 7  # there transformers counts padding on the left as positions
    graphdef, _ = graph(config, COMPUTE)
    as_torch = [torch.tensor(x) for x in (sources, mask, inputs, labels)]
    theirs = model(
        input_ids=as_torch[0], attention_mask=as_torch[1], decoder_input_ids=as_torch[2], labels=as_torch[3],
        use_cache=False,
    )  # fmt: skip
    bound = lambda params: bind(graphdef, params)
    logits = bound(params)(jnp.asarray(sources), jnp.asarray(inputs), jnp.asarray(mask))
    wanted = theirs.logits.detach().numpy()
    np.testing.assert_allclose(logits, wanted, atol=1e-4 * np.abs(wanted).max())
    theirs.loss.backward()
    loss, gradients = jax.value_and_grad(lambda p: nats(bound, p, sources, mask, inputs, labels))(params)
    np.testing.assert_allclose(loss, theirs.loss.item(), rtol=1e-5)
    grads = {name: weight.grad for name, weight in model.named_parameters()}
    found, sizes = named_leaves(gradients), sizes_of(config)
    for row in family.rows(config):
        if row.ours == "logit_bias":
            continue  # a buffer in transformers
        for index, name in enumerate(names(row, sizes)):
            leaf = found[row.ours][index] if "{" in row.theirs else found[row.ours]
            wanted = take(row, grads[name].numpy(), sizes)
            np.testing.assert_allclose(leaf, wanted, atol=2e-5 + 2e-4 * np.abs(wanted).max(), err_msg=name)


PLAIN = [
    {"early_stopping": early, "length_penalty": penalty}
    for early in (False, True, "never")
    for penalty in (0.0, 1.0, 2.0, -0.5)
]
RULED = [
    {"no_repeat_ngram_size": 2, "bad_words_ids": [[138], [30, 31], [263, 5]], "min_length": 6,
     "repetition_penalty": 1.3, "renormalize_logits": renormalise, "early_stopping": early, "length_penalty": 0.8}
    for early in (False, True) for renormalise in (False, True)
]  # fmt: skip
FORCED = [
    {"forced_bos_token_id": 9, "forced_eos_token_id": 2, "length_penalty": penalty, "early_stopping": early}
    for early in (False, True) for penalty in (2.0, -0.5)
]  # fmt: skip


@pytest.mark.parametrize(
    ("pair", "asked"),
    [("t5", PLAIN), ("bart", FORCED), ("marian", RULED)], ids=["plain", "forced", "ruled"], indirect=["pair"],
)  # fmt: skip
def test_beams_are_those_of_transformers_alone_and_in_a_batch(pair, asked):
    _, model, path = pair
    _, config, params = ours(path)
    sources = [list(range(5, 19)), list(range(40, 47)), [8, 9]]
    decoder = Decoder(config, params, COMPUTE)
    lengths = set()
    for index, each in enumerate(asked):
        # Others each time: targets of random weights repeat few tokens, so with one choice they end at once or never.
        stops = [1, 2, *random.Random(index % 4).sample(range(10, 280), 60)]
        asks = {"num_beams": 4, "max_length": 15, "forced_eos_token_id": None, **each}
        search, sampler = Search.read(asks)
        forced = [asks["forced_bos_token_id"]] if "forced_bos_token_id" in asks else []
        limits = Limits(14 - len(forced), tuple(stops), None, search.rules(stops, len(forced)))
        requests = [Request([config.start_token, *forced], source=source) for source in sources]
        found = decoder.answer(requests, 4, sampler, limits, search, len(forced))
        for source, answers in zip(sources, found, strict=True):
            written = model.generate(
                torch.tensor([source]), do_sample=False, num_return_sequences=4, eos_token_id=stops,
                pad_token_id=3, **asks,
            )  # fmt: skip
            mine = [[config.start_token, *forced, *answer.tokens] for answer in answers]
            padded = [row + [3] * (written.shape[1] - len(row)) for row in mine]
            assert padded == written.tolist(), asks
            lengths |= {len(row) for row in mine}
        alone = decoder.answer(requests[1:2], 4, sampler, limits, search, len(forced))[0]
        assert [answer.tokens for answer in alone] == [answer.tokens for answer in found[1]]
    assert len(lengths) > 3


def test_greedy_targets_are_those_of_transformers_alone_and_in_a_batch(pair):
    _, model, path = pair
    _, config, params = ours(path)
    sources = [list(range(5, 19)), list(range(40, 47))]
    decoder = Decoder(config, params, COMPUTE)
    wanted = []
    for source in sources:
        written = model.generate(
            torch.tensor([source]), max_new_tokens=16, min_new_tokens=16, num_beams=1, do_sample=False,
            forced_bos_token_id=None, eos_token_id=None, suppress_tokens=None, bad_words_ids=None,
        )  # fmt: skip
        wanted.append(written[0, 1:].tolist())
    requests = [Request([config.start_token], 0, source) for source in sources]
    assert [done.tokens for done in decoder.generate(requests, Sampler(temperature=0.0), Limits(16))] == wanted
    streamed = decoder.stream(requests[1], Sampler(temperature=0.0), Limits(16))
    assert [each.tokens[0] for each in streamed] == wanted[1]


def test_an_export_is_the_import_bitwise_and_transformers_computes_the_same_with_it(pair, tmp_path):
    _, model, path = pair
    family, config, params = ours(path)
    again, description = words_for(config)
    assert again == family
    writer = Writer(tmp_path)
    write_params(params, family.rows(config), config, writer)
    writer.close()
    padded = description | {"pad_token_id": model.config.pad_token_id}  # which the tokenizer knows, not the model
    (tmp_path / "config.json").write_text(json.dumps(padded))
    one, other = Checkpoint(path), Checkpoint(tmp_path)
    for name in other:
        np.testing.assert_array_equal(other[name], one[name], err_msg=name)
    theirs = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    sources, mask, inputs, _ = (torch.tensor(x) for x in batch())
    with torch.no_grad():
        a, b = (m(input_ids=sources, attention_mask=mask, decoder_input_ids=inputs).logits for m in (model, theirs))
    np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize("pair", ["t5", "bart"], indirect=True)  # places as a bias, and as vectors
def test_a_packed_target_reads_only_its_own_source(pair):
    _, _, path = pair
    _, config, params = ours(path)
    graphdef, _ = graph(config, COMPUTE)
    model = bind(graphdef, params)
    first, second = (jnp.arange(start, start + 5)[None] for start in (10, 30))
    packed = model(
        jnp.concatenate([first, second], 1), jnp.concatenate([second, first], 1),
        jnp.asarray([[1] * 5 + [2] * 5]), jnp.asarray([[1] * 5 + [2] * 5]),
    )  # fmt: skip
    np.testing.assert_allclose(packed[:, :5], model(first, second), atol=2e-5)
    np.testing.assert_allclose(packed[:, 5:], model(second, first), atol=2e-5)


@pytest.mark.parametrize("pair", ["t5", "bart"], indirect=True)
def test_what_is_not_understood_is_one_error(pair):
    _, _, path = pair
    raw = json.loads((path / "config.json").read_text())
    with pytest.raises(ValueError, match=r"architectures=.*\n.*new_thing=3"):
        SEQ2SEQ[raw["model_type"]].parse(raw | {"new_thing": 3, "architectures": ["Other"]}, "config.json")


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("buckets", "reach"), [(32, 128), (16, 20), (12, 18), (64, 256)])
def test_buckets_are_those_of_transformers(buckets, reach, both_ways):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-reach, reach + 1)
    bucket = T5Attention._relative_position_bucket
    wanted = bucket(distance, bidirectional=both_ways, num_buckets=buckets, max_distance=reach)
    config = RelativeBias(buckets=buckets, max_distance=reach)
    assert list(relative_buckets(config, both_ways=both_ways)) == wanted.tolist()
