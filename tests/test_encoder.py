"""Encoders as a user meets them: loaded from a directory, asked for vectors, labels and words, exported again."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.convert import main as convert
from jaxllm.core.tree import map_named, named_leaves
from jaxllm.data.tokenizers import text_pairs
from jaxllm.encoder import Encoder
from jaxllm.hf.checkpoint import Checkpoint, Writer
from jaxllm.layers.config import Gated, LayerNorm, Learned, Plain
from jaxllm.locate import look
from jaxllm.models.build import abstract_params
from jaxllm.models.config import ModelConfig
from jaxllm.models.encoder_config import Classes, Embeddings, EncoderConfig, MaskedLM
from jaxllm.recipe import load_recipe
from jaxllm.sharding.config import MeshConfig
from jaxllm.sharding.mesh import make_mesh

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIAL, "a", "cat", "sat", "on", "the", "mat", "dog", "ran", "paris", "is", "france", "of"]
STACK = ModelConfig(
    vocab_size=20, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_seq_len=40, norm=LayerNorm(eps=1e-12),
    norm_placement="post", embed_norm=True, positions=Learned(), ffn=Plain(activation="gelu"), bias=True,
    tie_embeddings=True,
)  # fmt: skip
TEXTS = ["a cat sat on the mat", "the dog ran", "paris is a cat of the mat on the mat of the cat of france"]
HEADS = {
    "tokens": MaskedLM(), "labels": Classes(labels=("bad", "good")), "vectors": Embeddings(pooler=True),
    "several": Classes(labels=("x", "y", "z"), problem="multi_label_classification"),
    "value": Classes(labels=("score",), problem="regression"), "plain": Embeddings(pooler=False),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return text_pairs.load(directory)


@pytest.fixture(scope="module")
def encoders(tokenizer):
    """{head: encoder with random weights}."""
    found = {}
    for name, head in HEADS.items():
        offset = 1 if name == "labels" else 0  # one row of the table is not used
        places = {"positions": Learned(offset=offset), "max_seq_len": STACK.max_seq_len - offset}
        config = EncoderConfig(stack=STACK.model_copy(update=places), head=head)
        generator = np.random.default_rng(0)
        draw = lambda path, leaf, generator=generator: jnp.asarray(
            generator.normal(path.endswith("scale"), 0.3, leaf.shape), jnp.float32
        )
        found[name] = Encoder(config, map_named(draw, abstract_params(config)), tokenizer)
    return found


def ids_of(encoder, text, special=False):
    return np.array([encoder.tokenizer.encode([text], 99, special=special)[0].ids])


def rows_of(encoder, texts):
    """(tokens, mask) of texts, padded to 32 columns: one program for all."""
    ids = [encoder.tokenizer.encode([text], 99)[0].ids for text in texts]
    tokens = np.array([each + [0] * (32 - len(each)) for each in ids])
    return tokens, np.arange(32)[None] < np.array([[len(each)] for each in ids])


def test_vectors_are_pooled_hidden_states_whatever_the_batch(encoders):
    encoder = encoders["vectors"]
    tokens, mask = rows_of(encoder, TEXTS)
    hidden = [row[real] for row, real in zip(np.asarray(encoder.hidden(tokens, mask)), mask, strict=True)]
    mean = np.stack([row.mean(0) for row in hidden])
    for size in (1, 32):
        np.testing.assert_allclose(encoder.embed(TEXTS, normalise=False, batch_size=size), mean, atol=1e-5)
    unit = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    np.testing.assert_allclose(encoder.embed(TEXTS), unit, atol=1e-5)
    first = np.stack([row[0] for row in hidden])
    np.testing.assert_allclose(encoder.embed(TEXTS, pooling="first", normalise=False), first, atol=1e-5)
    dense = jax.tree.map(np.asarray, encoder.params["head"]["dense"])
    pooled = np.tanh(first @ dense["kernel"] + dense["bias"])
    np.testing.assert_allclose(encoder.embed(TEXTS, pooling="pooler", normalise=False), pooled, atol=1e-5)
    np.testing.assert_array_equal(encoder.embed(TEXTS[0]), encoder.embed([TEXTS[0]]))


def test_a_pair_is_two_types(encoders):
    encoder = encoders["vectors"]
    pair = ("a cat", "the dog")
    types = np.array([[0, 0, 0, 0, 1, 1, 1]])
    hidden = encoder.hidden(ids_of(encoder, pair), types=types)
    np.testing.assert_allclose(encoder.embed(pair, normalise=False), hidden.mean(1), atol=1e-5)
    assert np.abs(encoder.hidden(ids_of(encoder, pair)) - hidden).max() > 1e-2


def test_few_programs_are_compiled(encoders):
    encoder = Encoder(encoders["plain"].config, encoders["plain"].params, encoders["plain"].tokenizer)
    encoder.embed(["a " * n for n in range(1, 25)], batch_size=4)
    assert encoder._pool._cache_size() == 1


def test_padding_on_either_side_changes_nothing(encoders):
    encoder = encoders["tokens"]
    ids = ids_of(encoder, TEXTS[0])
    alone = np.asarray(encoder.logits(ids))
    for before, after in ((5, 0), (0, 5), (2, 3)):
        padded = np.pad(ids, ((0, 0), (before, after)))
        mask = np.pad(np.ones_like(ids), ((0, 0), (before, after)))
        logits = np.asarray(encoder.logits(padded, mask))[:, before : before + ids.shape[1]]
        np.testing.assert_allclose(logits, alone, atol=2e-5)


def test_labels_with_probabilities(encoders):
    found = encoders["labels"].classify(TEXTS)
    tokens, mask = rows_of(encoders["labels"], TEXTS)
    for each, logits in zip(found, np.asarray(encoders["labels"].logits(tokens, mask)), strict=True):
        probabilities = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(list(each.probabilities.values()), probabilities, atol=1e-5)
        assert each.label == ("bad", "good")[logits.argmax()]
        assert each.probability == each.probabilities[each.label]
    several = encoders["several"]
    logits = np.asarray(several.logits(*rows_of(several, TEXTS[1:2])))[0]
    found = several.classify(TEXTS[1])[0].probabilities
    np.testing.assert_allclose(list(found.values()), 1 / (1 + np.exp(-logits)), atol=1e-5)


def test_the_missing_word(encoders):
    encoder = encoders["tokens"]
    found = encoder.fill("Paris is the [MASK] of France", top=3)
    logits = np.asarray(encoder.logits(ids_of(encoder, "Paris is the [MASK] of France", special=True)))[0, 4]
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    order = np.argsort(-probabilities[: len(VOCABULARY)])[:3]  # the table has three rows more, which are no tokens
    assert [each.id for each in found] == order.tolist()
    np.testing.assert_allclose([each.probability for each in found], probabilities[order], atol=1e-5)
    assert [each.token for each in found] == [VOCABULARY[token] for token in order]
    word = next((each for each in found if not each.token.startswith("[")), None)
    assert word is None or word.text == f"paris is the {word.token} of france"


@pytest.mark.parametrize("name", list(HEADS))
def test_an_export_loads_as_the_same_encoder(encoders, tmp_path, name):
    before = encoders[name]
    after = jaxllm.load(jaxllm.export(before, tmp_path / "out"))
    assert isinstance(after, jaxllm.Encoder)
    assert after.config == before.config
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == (
        "roberta" if name == "labels" else "bert"
    )
    leaves = named_leaves(after.params)
    assert set(leaves) == set(named_leaves(before.params))
    for leaf, value in named_leaves(before.params).items():
        np.testing.assert_array_equal(leaves[leaf], value)
    assert after.tokenizer.encode(TEXTS, 99) == before.tokenizer.encode(TEXTS, 99)
    with pytest.raises(ValueError, match="is not empty"):
        jaxllm.export(before, tmp_path / "out")


def test_loaded_onto_a_mesh(encoders, tmp_path):
    path = jaxllm.export(encoders["vectors"], tmp_path / "out")
    spread = jaxllm.load(path, mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert not spread.params["stack"]["blocks"]["ffn"]["up"]["kernel"].sharding.is_fully_replicated
    np.testing.assert_allclose(spread.embed(TEXTS), encoders["vectors"].embed(TEXTS), atol=1e-5)


def rewrite(path, names, config=()):
    """Give the tensors of a directory other names, or other values; None leaves one out."""
    tensors = dict(Checkpoint(path))
    writer = Writer(path)
    for name, tensor in names(tensors).items():
        writer.add(name, tensor)
    writer.close()
    raw = json.loads((path / "config.json").read_text()) | dict(config)
    (path / "config.json").write_text(json.dumps(raw))


def test_old_names_and_leftovers_are_understood(encoders, tmp_path):
    before = encoders["tokens"]
    path = jaxllm.export(before, tmp_path / "out")

    def old(tensors):
        spelled = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            .removeprefix("bert."): tensor for name, tensor in tensors.items()
        }  # fmt: skip
        table, bias = spelled["embeddings.word_embeddings.weight"], spelled.pop("cls.predictions.bias")
        left = {"pooler.dense.weight", "pooler.dense.bias", "cls.seq_relationship.weight", "embeddings.position_ids"}
        return {**spelled, "cls.predictions.decoder.weight": table, "cls.predictions.decoder.bias": bias,
                **dict.fromkeys(left, np.ones(3, np.float32))}  # fmt: skip

    rewrite(path, old, {"pooler_type": "first_token_transform", "position_embedding_type": "absolute"})
    after = jaxllm.load(path)
    assert after.config == before.config
    ids = ids_of(before, TEXTS[0])
    np.testing.assert_array_equal(after.logits(ids), before.logits(ids))


@pytest.mark.parametrize(
    ("names", "config", "message"),
    [
        (dict, {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key': only 'absolute'"),
        (dict, {"is_decoder": True}, "is_decoder=True: only False"),
        (dict, {"add_cross_attention": True}, "add_cross_attention=True: only False"),
        (dict, {"sinks": 4}, "sinks=4: unknown, and it may change the model"),
        (dict, {"architectures": ["BertForTokenClassification"]}, "known are BertForMaskedLM, BertForSequenceClass"),
        (dict, {"num_hidden_layers": 3}, r"bert\.encoder\.layer\.2\.output\.dense\.weight: missing"),
        (lambda t: t | {"bert.extra.weight": t["cls.predictions.bias"]}, {}, r"extra\.weight: not part of this model"),
        (
            lambda t: t | {"cls.predictions.decoder.weight": -t["bert.embeddings.word_embeddings.weight"]},
            {},
            "decoder.weight: differs from bert.embeddings",
        ),
        (lambda t: t | {"embeddings.LayerNorm.gamma": t["bert.embeddings.LayerNorm.weight"]}, {}, "twice"),
    ],
)
def test_what_cannot_be_exact_is_refused(encoders, tmp_path, names, config, message):
    path = jaxllm.export(encoders["tokens"], tmp_path / "out")
    rewrite(path, names, config)
    with pytest.raises(ValueError, match=message):
        jaxllm.load(path)


def test_labels_without_numbers_in_order_are_refused(encoders, tmp_path):
    path = jaxllm.export(encoders["labels"], tmp_path / "out")
    rewrite(path, dict, {"id2label": {"1": "a", "3": "b"}})
    with pytest.raises(ValueError, match=r"id2label has the numbers \[1, 3\]"):
        jaxllm.load(path)


def test_an_encoder_that_no_family_computes_is_refused(encoders, tmp_path):
    stack = STACK.model_copy(update={"ffn": Gated()})
    encoder = Encoder(EncoderConfig(stack=stack), encoders["tokens"].params, encoders["tokens"].tokenizer)
    with pytest.raises(ValueError, match="no family of transformers computes this encoder"):
        jaxllm.export(encoder, tmp_path / "out")


def test_commands_that_write_text_say_what_it_is(encoders, tmp_path):
    path = jaxllm.export(encoders["tokens"], tmp_path / "out")
    with pytest.raises(ValueError, match="bert has an encoder"):
        look(path)


@pytest.mark.parametrize(
    ("name", "ask", "message"),
    [
        ("tokens", lambda e: e.classify("a"), "is a masked language model: use fill"),
        ("plain", lambda e: e.classify("a"), "without a head; classify needs one made for sequence"),
        ("value", lambda e: e.classify("a"), "gives values, not labels"),
        ("labels", lambda e: e.fill("a [MASK]"), "is no masked language model"),
        ("tokens", lambda e: e.fill("a cat"), r"has the mask '\[MASK\]' 0 times"),
        ("tokens", lambda e: e.fill("[MASK] [MASK]"), "2 times; write it once"),
        ("plain", lambda e: e.logits(np.ones((1, 3))), "no head that gives logits"),
        ("plain", lambda e: e.embed("a", pooling="pooler"), "has no pooler"),
        ("tokens", lambda e: e.embed("a", pooling="max"), "known are mean, first, pooler"),
        ("tokens", lambda e: e.embed([]), "0 texts in batches of 32"),
        ("tokens", lambda e: e.embed("a " * 50), r"text 0 has 52 tokens and the model takes 40 .*truncate=True"),
        ("labels", lambda e: e.logits(np.ones((1, 40))), r"rows of 40 tokens; the model takes 1 to max_seq_len=39"),
        ("tokens", lambda e: e.hidden(np.ones((1, 3), int), types=np.full((1, 3), 2)), "token type 2: the model has 2"),
        ("tokens", lambda e: Encoder(e.config.model_copy(update={"stack": STACK.model_copy(update={"vocab_size": 9})}),
                                     e.params, e.tokenizer), "the tokenizer has 17 ids and the model 9"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(encoders, name, ask, message):
    with pytest.raises(ValueError, match=message):
        ask(encoders[name])


def test_truncation_reads_the_beginning(encoders):
    encoder = encoders["tokens"]
    long, short = "cat " * 50, "cat " * 38
    np.testing.assert_array_equal(encoder.embed(long, truncate=True), encoder.embed(short))


def test_an_encoder_says_what_it_is(encoders):
    size = sum(leaf.size for leaf in jax.tree.leaves(encoders["labels"].params))
    assert repr(encoders["labels"]) == f"Encoder({size:,} parameters in float32, Classes)"


@pytest.mark.parametrize("name", ["tokens", "labels", "vectors"])
def test_converted_to_a_run_and_back(encoders, tmp_path, capsys, name):
    path = jaxllm.export(encoders[name], tmp_path / "hf")
    assert convert([str(path), str(tmp_path / "run")]) is None
    assert convert([str(tmp_path / "run"), str(tmp_path / "again")]) is None
    assert capsys.readouterr().out.count("to the last bit") == 2
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / file).read_bytes() == (path / file).read_bytes(), file
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("kernel: auto", "kernel: splash"))  # as if a TPU had trained it
    run = jaxllm.load(tmp_path / "run")
    assert load_recipe(recipe).compute.kernel == "splash"
    pair = [("a cat", "the dog")]
    assert run.tokenizer.encode(pair, 99) == encoders[name].tokenizer.encode(pair, 99)
    golden = tmp_path / "run" / "golden.json"
    golden.write_text(json.dumps({"logits": [each + 1 for each in json.loads(golden.read_text())["logits"]]}))
    with pytest.raises(ValueError, match="no longer computes what it did"):
        jaxllm.load(tmp_path / "run")
