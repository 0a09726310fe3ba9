"""Encoder-decoders and encoders trained by the command's loop: resumed, loaded, asked, exported, fine-tuned."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm.core.config import dump
from jaxllm.data.describe import BRACKETS
from jaxllm.data.loader import Loader
from jaxllm.data.objectives import HiddenTokens
from jaxllm.data.prepare import prepare
from jaxllm.data.prepare_config import BytesTokenizer, PrepareConfig
from jaxllm.data.reading.sources import RowFiles
from jaxllm.evaluate import main as evaluate
from jaxllm.inspect import main as inspect
from jaxllm.locate import look
from jaxllm.recipe import check, load_recipe
from jaxllm.training.metrics import read
from jaxllm.wiring import train

WORDS = {"cat": "chat", "dog": "chien", "sun": "soleil", "sea": "mer", "red": "rouge", "boy": "garcon", "day": "jour"}
TEXTS = [f"the {one} and the {other}" for one in WORDS for other in WORDS if one != other]
COMMON = """
checkpoint: {every: 400}
platform: {compile_cache: none}
compute: {layers: scan, dtype: float32}
"""
POST = "d_model: 64, n_layers: 1, n_heads: 2, d_ff: 96, max_seq_len: 48, norm: {kind: layer}, norm_placement: post, "
POST += "bias: true, tie_embeddings: true"
PAIRS = f"""
out: pairs-run
steps: 250
model:
  both: {{{POST}, positions: {{kind: sinusoids, interleaved: false}}, ffn: {{kind: plain, activation: relu}},
    embed_scale: 8.0, init_std: 0.1}}
  logit_bias: true
data: {{objective: {{kind: pairs}}, sources: [{{path: pairs}}], packing: {{seq_len: 32}}, batch_size: 8, threads: 0}}
optim: {{lr: 5e-3, schedule: {{kind: cosine, warmup: 10}}}}
step: {{label_smoothing: 0.1}}
monitor: {{log_every: 100, evaluate_every: 250, sample_every: 250, sample_tokens: 12, prompts: [sea]}}
"""
MASKED = f"""
out: masked-run
steps: 400
model:
  stack: {{{POST}, positions: {{kind: learned}}, embed_norm: true, ffn: {{kind: plain, activation: gelu}},
    init_std: 0.1}}
data: {{objective: {{kind: masked, rate: 0.2}}, sources: [{{path: texts}}], packing: {{seq_len: 48}}, batch_size: 8,
  threads: 0}}
optim: {{lr: 1e-2, schedule: {{kind: cosine, warmup: 20}}}}
monitor: {{log_every: 100, evaluate_every: 400, sample_every: 400, prompts: ["the c<mask>t and the sun"]}}
"""
LABELS = """
out: labels-run
start_from: masked-run
steps: 120
model: {head: {kind: classes, labels: [animal, thing]}}
data: {objective: {kind: labels, labels: [animal, thing]}, sources: [{path: labels}], packing: {seq_len: 24},
  batch_size: 8, threads: 0}
optim: {lr: 2e-3, schedule: {kind: cosine, warmup: 5}}
monitor: {log_every: 100, evaluate_every: 60, sample_every: 60, prompts: [a cat]}
"""
LABELLED = {
    f"{a} {word}": "animal" if word in ("cat", "dog") else "thing" for word in WORDS for a in ("a", "the", "my")
}


def lines(name, rows):
    with open(name, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Datasets and recipes: word pairs, sentences, and texts with labels."""
    jax.devices()  # all eight, before `train` can ask for one per core
    path = tmp_path_factory.mktemp("encoders")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        lines("pairs.jsonl", [{"en": en, "fr": fr} for en, fr in WORDS.items()])
        lines("texts.jsonl", [{"text": text} for text in TEXTS])
        lines("labels.jsonl", [{"text": text, "label": label} for text, label in LABELLED.items()])
        for name, fields, chat in (("pairs", "en,fr", True), ("texts", "text", False), ("labels", "text,label", True)):
            source = RowFiles(path=f"{name}.jsonl", fields=fields)
            made = {"out": name, "tokenizer": BytesTokenizer(), "validation": 1, "seq_len": 32, "chat": chat}
            prepare(PrepareConfig(inputs=(source,), **made))
        for name, recipe in (("pairs", PAIRS), ("masked", MASKED), ("labels", LABELS)):
            (path / f"{name}.yaml").write_text(recipe + COMMON)
    return path


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def pairs_run(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train(load_recipe("pairs.yaml"))
    return place / "pairs-run"


@pytest.fixture(scope="module")
def masked_run(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train(load_recipe("masked.yaml"))
    return place / "masked-run"


def test_an_encoder_decoder_learns_pairs_by_heart(pairs_run):
    model = jaxllm.load(pairs_run)
    assert isinstance(model, jaxllm.EncoderDecoder)
    right = [answer.text == fr for answer, fr in zip(model.generate([*WORDS]), WORDS.values(), strict=True)]
    assert sum(right) >= len(WORDS) - 1  # one is held out
    metrics = read(pairs_run / "metrics.jsonl")
    assert "val_bits_per_byte" in metrics[-1]
    assert metrics[-2]["objective"] > metrics[-2]["loss"] + 0.1  # smoothing is in what is trained alone
    assert read(pairs_run / "samples.jsonl")[-1] == {
        "step": 250,
        "prompt": "sea",
        "text": model.generate("sea")[0].text,
    }
    with pytest.raises(ValueError, match="has an encoder; jaxllm\\.load reads it"):
        look(pairs_run)


def test_pairs_are_read_by_transformers_as_marian(pairs_run, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = jaxllm.load(pairs_run)
    jaxllm.export(model, tmp_path / "out")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == "MarianMTModel"
    rows = tokenizer(["sea", "the dog"], return_tensors="pt", padding=True)
    ours = [each.ids for each in model.tokenizer.encode(["sea", "the dog"], 48)]
    assert rows["input_ids"].tolist() == [[*ours[0], 0, 0, 0, 0], ours[1]]
    targets = np.array([[0, 115, 118], [0, 109, 107]])
    with torch.no_grad():
        found = theirs(
            input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], decoder_input_ids=torch.tensor(targets)
        ).logits.numpy()
    mask = rows["attention_mask"].numpy().astype(bool)
    np.testing.assert_allclose(model.logits(rows["input_ids"].numpy(), mask, targets=targets), found, atol=2e-4)
    again = jaxllm.load(tmp_path / "out")
    assert again.generate([*WORDS]) == model.generate([*WORDS])


@pytest.mark.parametrize("name", [pytest.param("pairs", marks=pytest.mark.soak), "masked", "labels"])
def test_a_resumed_run_computes_what_an_undisturbed_one_does(name, masked_run):
    short = ["steps=4", "step.dropout.rate=0.1", "monitor.prompts=[]", "monitor.evaluate_every=2", "checkpoint.every=2"]
    train(load_recipe(f"{name}.yaml", [f"out={name}-straight", *short]))
    shutil.copytree(f"{name}-straight", f"{name}-again")
    shutil.rmtree(f"{name}-again/checkpoints/4")
    train(load_recipe(f"{name}-again"))
    straight, again = (read(f"{name}-{which}/metrics.jsonl") for which in ("straight", "again"))
    assert again == straight
    assert len([each for each in straight if "val_loss" in each]) == 2


def test_an_encoder_learns_hidden_tokens_and_fills_them_in(masked_run, tmp_path):
    model = jaxllm.load(masked_run)
    assert isinstance(model, jaxllm.Encoder)
    assert model.tokenizer.mask == "<mask>"
    metrics = [each for each in read(masked_run / "metrics.jsonl") if "val_loss" in each]
    assert metrics[-1]["val_loss"] < 0.7
    assert "val_bits_per_byte" not in metrics[-1]
    first, *others = model.fill("the c<mask>t and the sun")
    assert "a" in {first.token, *(each.token for each in others[:2])}  # rounding decides which is first
    assert read(masked_run / "samples.jsonl")[-1]["text"].startswith(f"{first.token} {first.probability:.2f}")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    jaxllm.export(model, tmp_path / "out")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == "BertForMaskedLM"
    rows = tokenizer(["the <mask>un and the cat"], return_tensors="pt")
    assert (
        rows["input_ids"][0].tolist() == model.tokenizer.encode(["the <mask>un and the cat"], 48, special=True)[0].ids
    )
    with torch.no_grad():
        found = theirs(input_ids=rows["input_ids"]).logits.numpy()
    np.testing.assert_allclose(model.logits(rows["input_ids"].numpy()), found, atol=2e-4)


def test_labels_are_learned_on_top_of_it(masked_run):
    train(load_recipe("labels.yaml"))
    model = jaxllm.load("labels-run")
    found = [each.label for each in model.classify([*LABELLED])]
    assert np.mean([label == right for label, right in zip(found, LABELLED.values(), strict=True)]) > 0.9
    assert read("labels-run/samples.jsonl")[-1]["text"].startswith("animal ")
    # Of a model that is often wrong, by its parameters of before: what evaluate counts is what classify says.
    model = jaxllm.Encoder(model.config, jax.tree.map(lambda x: x * 0.6, model.params), model.tokenizer)
    model.save("labels-other")
    said = {text: each.label for text, each in zip(LABELLED, model.classify([*LABELLED]), strict=True)}
    source = RowFiles(path="labels.jsonl", fields="text,label")
    prepare(PrepareConfig(inputs=(source,), out="held", tokenizer=BytesTokenizer(), validation=15, chat=True))
    measured = measure("labels-other", "--data", "held", "--seq-len", "24")
    held = Loader(load_recipe("labels.yaml", ["data.sources.0.path=held"]).data, "validation")
    texts = [bytes(int(i) - 6 for i in row if i > 5).decode() for row in (held.row(i).tokens for i in range(15))]
    hits = [said[text] == LABELLED[text] for text in texts]
    assert 0 < sum(hits) < 15
    assert measured["accuracy"] == pytest.approx(np.mean(hits))
    for label in ("animal", "thing"):
        right, guessed = ({text for text in texts if which[text] == label} for which in (LABELLED, said))
        assert measured[f"f1 {label}"] == pytest.approx(2 * len(right & guessed) / (len(right) + len(guessed)))


def measure(run, *flags):
    assert evaluate([str(run), "--batch-size", "8", "--out", "found.json", *flags]) is None
    return json.loads(Path("found.json").read_text())["perplexity"]


def test_held_out_data_is_measured_as_while_training(pairs_run, masked_run, capsys):
    for run in (pairs_run, masked_run):
        found, before = measure(run), read(run / "metrics.jsonl")[-1]
        assert found["nats_per_token"] == pytest.approx(before["val_loss"], rel=1e-5)
    assert found["accuracy"] == pytest.approx(before["val_accuracy"])
    assert found["accuracy"] > 0.5
    assert " hidden tokens of validation text, " in capsys.readouterr().out
    jaxllm.load(pairs_run).save("pairs-saved")
    assert jaxllm.load("pairs-saved").generate([*WORDS]) == jaxllm.load(pairs_run).generate([*WORDS])
    found = measure("pairs-saved", "--data", "pairs")
    [(source, right, written)] = found["examples"]
    assert (WORDS[source], jaxllm.load(pairs_run).generate(source)[0].text) == (right, written)
    assert (found["pairs"], found["correct"]) == (1, right == written)
    assert evaluate([str(pairs_run), "--tasks", "qa"]) == 2
    assert "has an encoder; jaxllm.load reads it, but here a model must continue text" in capsys.readouterr().err


def test_what_is_hidden_is_decided_by_seed_and_sample_alone(place):
    config = load_recipe("masked.yaml").data
    small, large, other = (
        Loader(config.model_copy(update=change)) for change in ({"batch_size": 4}, {}, {"batch_size": 4, "seed": 1})
    )
    assert small.vocab_size == 263  # the mask is behind the tokenizer's own
    first, second, whole = next(small), next(small), next(large)
    for one, two, both in zip(first, second, whole, strict=True):
        np.testing.assert_array_equal(np.concatenate([one, two]), both)
    assert not np.array_equal(next(other).weights, first.weights)
    hidden = whole.tokens == 262
    assert np.all(whole.weights[hidden] == 1)
    assert np.all(whole.targets[whole.weights == 1] >= 6)  # never a special token
    rows = len(large.plans[0])
    again = [large.row(i) for i in range(rows, 2 * rows)]
    assert len({row.weights.tobytes() for row in again} & {large.row(i).weights.tobytes() for i in range(rows)}) == 0
    assert any(2 in row.targets for row in again)  # the end of a text is read, and not cut off
    everything = config.model_copy(update={"objective": HiddenTokens(rate=1.0, hidden=1.0, random=0.0)})
    row = Loader(everything).row(0)
    assert set(row.tokens.tolist()) <= {262, 0, 1, 2}


def test_pairs_are_packed_side_by_side(place):
    loader = Loader(load_recipe("pairs.yaml").data)
    row = next(loader)
    text = lambda ids: bytes(int(i) - 6 for i in ids if i > 5).decode()
    seen = {}
    for index in range(8):
        for segment in range(1, row.segments[index].max() + 1):
            source = row.sources[index][row.source_segments[index] == segment]
            target = row.targets[index][row.segments[index] == segment]
            assert (source[-1], target[-1]) == (2, 2)
            seen[text(source)] = text(target)
    assert seen.items() <= WORDS.items()
    assert len(seen) == len(WORDS) - 1
    assert np.array_equal(row.weights > 0, row.segments > 0)


@pytest.mark.parametrize("name", ["pairs", "masked", "labels"])
def test_inspect_shows_what_is_learned(name, masked_run, capsys):
    (run := Path(f"{name}-shown")).mkdir()
    (run / "recipe.yaml").write_text(dump(load_recipe(f"{name}.yaml")))
    assert inspect([str(run), "--rows", "1"]) is None
    shown, loader = capsys.readouterr().out, Loader(load_recipe(run).data)
    learned = re.findall(f"{BRACKETS[0]}(.*?){BRACKETS[1]}", shown.partition("\n")[2])
    row = loader.row(0)
    if name == "labels":
        label = load_recipe(run).model.head.labels[row.labels]
        assert learned == [f"{label}<eos>"]
        assert [each for text, each in LABELLED.items() if f"\n<bos>{text}<eos>" in shown] == [label]
    elif name == "pairs":
        assert learned == [f"{WORDS[word]}<eos>" for word in re.findall(r"(?m)^(\w+)<eos>", shown)] != []
    else:
        assert sum(map(len, learned)) == row.weights.sum() > 0
        assert any(f"<bos>{text}<eos>" in re.sub("|".join(BRACKETS), "", shown) for text in TEXTS)  # as it was


def test_what_does_not_go_together_is_refused(masked_run):
    def problem(name, *overrides):
        recipe = load_recipe(f"{name}.yaml", list(overrides))
        with pytest.raises(ValueError, match="the recipe contradicts itself") as error:
            check(recipe, vocab_size=262, n_devices=1)
        return str(error.value)

    said = "data.objective.kind=next_token is not for this model, which is encoder-decoder; set it to pairs"
    assert said in problem("pairs", "data.objective.kind=next_token")
    said = "data.objective.kind=pairs is not for this model, which is encoder-only; set it to masked"
    assert said in problem("masked", "data.objective.kind=pairs")
    assert "learns nothing here" in problem("masked", "model.head={kind: embeddings}")
    assert "data.packing.seq_len=64 is longer than model.max_seq_len=48" in problem("pairs", "data.packing.seq_len=64")
    with pytest.raises(ValueError, match=r"texts has text, and pairs are conversations; prepare it with --chat"):
        Loader(load_recipe("pairs.yaml", ["data.sources.0.path=texts"]).data)
    with pytest.raises(ValueError, match=r"pairs has conversations, and tokens are hidden in text"):
        Loader(load_recipe("masked.yaml", ["data.sources.0.path=pairs"]).data)
    plants = ["data.objective.labels=[animal, plant]"]
    assert "['animal', 'plant'] are not model.head.labels=['animal', 'thing']" in problem("labels", *plants)
    assert "z_loss is for tokens, and not for labels" in problem("labels", "step.z_loss=0.1")
    with pytest.raises(
        ValueError, match=r"labels has the answers 'thing', and data.objective.labels are 'animal', 'plant'"
    ):
        Loader(load_recipe("labels.yaml", plants).data)
