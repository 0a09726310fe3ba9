"""Encoders and encoder-decoders from Hugging Face directories, fine-tuned by the command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.core.tree import map_named, named_leaves
from jaxllm.data.loader import Loader
from jaxllm.data.tokenizers import text_pairs
from jaxllm.encoder import Encoder
from jaxllm.encoder_decoder import EncoderDecoder
from jaxllm.evaluate import main as evaluate
from jaxllm.layers.config import LayerNorm, Learned, Plain
from jaxllm.models.build import abstract_params
from jaxllm.models.config import ModelConfig
from jaxllm.models.encoder_config import Embeddings, EncoderConfig, MaskedLM
from jaxllm.models.seq2seq_config import Seq2SeqConfig
from jaxllm.prepare import main as prepare
from jaxllm.recipe import load_recipe, shipped
from jaxllm.tune import main as tune

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "cat",
    "dog",
    "ran",
    "sat",
    "##s",
    "sci",
    "/",
    "tech",
    "pet",
]
STACK = ModelConfig(
    vocab_size=15, d_model=16, n_layers=1, n_heads=2, d_ff=24, max_seq_len=32, norm=LayerNorm(eps=1e-12),
    norm_placement="post", embed_norm=True, positions=Learned(), ffn=Plain(activation="gelu"), bias=True,
    tie_embeddings=True,
)  # fmt: skip
ROWS = [{"x": "cats ran", "y": "Pet"}, {"x": "a dog sat", "y": "Sci/Tech"}] * 6
STILL = ["steps=1", "optim.lr=1e-9", "data.batch_size=8", "data.threads=0", "platform.compile_cache=none"]


def drawn(config):
    draw = np.random.default_rng(0)
    values = lambda name, leaf: jnp.asarray(draw.normal(name.endswith("scale"), 0.3, leaf.shape), jnp.float32)
    return map_named(values, abstract_params(config))


@pytest.fixture(autouse=True)
def rows(tmp_path, monkeypatch):
    jax.devices()  # all eight, before the command can ask for one per core
    monkeypatch.chdir(tmp_path)
    with open("rows.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)


def prepared(*flags):
    flags = ["--chat", "--jsonl", "rows.jsonl:x,y", "--tokenizer", "hf", "--validation", "2", "--out", "data", *flags]
    assert prepare([*flags, "clean.deduplicate=false"]) is None


@pytest.mark.parametrize("head", [MaskedLM(), Embeddings()], ids=["masked", "pooler"])
def test_labels_on_top_of_a_bert(head, tmp_path, capsys):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    config = EncoderConfig(stack=STACK, head=head)
    before = Encoder(config, drawn(config), text_pairs.load(tmp_path))
    jaxllm.export(before, "hf")
    prepared()
    labels = "labels=[Pet, Sci/Tech]"
    recipe = [str(shipped("classes.yaml")), "start_from=hf", f"model.head.{labels}", f"data.objective.{labels}"]
    recipe += ["data.sources.0.path=data", "data.packing.seq_len=16", "monitor.prompts=[a cat]", "out=run", *STILL]
    assert tune(recipe) == 0
    after = jaxllm.load("run")
    for pair in ("cats ran", ("a cat", "dogs sat")):  # with types of both, as the checkpoint has it
        assert after.tokenizer.encode([pair], 32) == before.tokenizer.encode([pair], 32)
    row = Loader(load_recipe("run").data).row(0)
    assert row.tokens[row.segments > 0].tolist() in [before.tokenizer.encode([each["x"]], 32)[0].ids for each in ROWS]
    leaves = named_leaves(after.params)
    kept = {name: leaf for name, leaf in named_leaves(before.params).items() if not name.startswith("head")}
    for name, leaf in kept.items():
        np.testing.assert_allclose(leaves[name], leaf, atol=1e-6, err_msg=name)
    if isinstance(head, Embeddings):
        pooler = before.params["head"]["dense"]["kernel"]
        np.testing.assert_allclose(after.params["head"]["pooler"]["dense"]["kernel"], pooler, atol=1e-6)
    if isinstance(head, MaskedLM):
        return
    assert evaluate(["run", "--batch-size", "8"]) is None
    assert " of 2 held-out texts right" in capsys.readouterr().out
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    jaxllm.export(after, "out")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained("out").eval()
    ids = transformers.AutoTokenizer.from_pretrained("out")(["cats ran"], return_tensors="pt")["input_ids"]
    assert ids.tolist() == [before.tokenizer.encode(["cats ran"], 32)[0].ids]
    with torch.no_grad():
        np.testing.assert_allclose(after.logits(ids.numpy()), theirs(input_ids=ids).logits.numpy(), atol=1e-5)
    assert theirs.config.id2label == {0: "Pet", 1: "Sci/Tech"}


@pytest.mark.soak
def test_pairs_on_top_of_a_bart(capsys):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {name: i for i, name in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    model = Tokenizer(models.BPE(vocabulary, []))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    model.add_special_tokens(special)
    tokenizer = text_pairs.PairTokenizer(
        model.to_str(), {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    )
    stack = STACK.model_copy(update={"vocab_size": 260, "positions": Learned(offset=2), "norm": LayerNorm()})
    config = Seq2SeqConfig(encoder=stack, decoder=stack, start_token=2, logit_bias=True)
    asked = {"num_beams": 2, "max_length": 9}
    before = EncoderDecoder(config, drawn(config), tokenizer, stop_ids=[2], forced=[0], asked=asked)
    jaxllm.export(before, "hf")
    prepared()
    recipe = [str(shipped("translation-tune.yaml")), "start_from=hf", "data.sources.0.path=data", "out=run"]
    assert tune([*recipe, "data.packing.seq_len=32", "monitor.prompts=[a cat]", "monitor.sample_tokens=8", *STILL]) == 0
    row = Loader(load_recipe("run").data).row(0)
    for side, segments, field in ((row.sources, row.source_segments, "x"), (row.targets, row.segments, "y")):
        known = [tokenizer.encode([each[field]], 32)[0].ids for each in ROWS]
        assert side[segments == 1].tolist() in known
    for after in (jaxllm.load("run"), _resumed()):
        assert (after.forced, after.stop_ids, after.search) == ((0,), (2,), before.search)
        written = [[each.tokens for each in lm.generate(["a cat", "dogs"])] for lm in (after, before)]
        assert written[0] == written[1]
    assert evaluate(["run", "--batch-size", "8"]) is None
    assert "BLEU 0.0 of 2 targets, 0 right to the letter" in capsys.readouterr().out


def _resumed():
    assert tune(["run", "steps=2"]) == 0
    return jaxllm.load("run")
