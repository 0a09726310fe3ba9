"""Encoder-decoders as a user meets them: loaded from a directory, asked for targets, exported again."""

import importlib
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

import jaxllm
from jaxllm import sample
from jaxllm.convert import main as convert
from jaxllm.core.tree import map_named, named_leaves
from jaxllm.data.loader import Loader
from jaxllm.data.tokenizers.text_pieces import TextPieces
from jaxllm.encoder_decoder import EncoderDecoder
from jaxllm.inference.sampling import Sampler
from jaxllm.layers.config import LayerNorm, Learned, Plain, RelativeBias, Sinusoids
from jaxllm.locate import look
from jaxllm.models.build import abstract_params
from jaxllm.models.config import ModelConfig
from jaxllm.models.seq2seq_config import Seq2SeqConfig
from jaxllm.prepare import main as prepare
from jaxllm.recipe import load_recipe, shipped
from jaxllm.sharding.config import MeshConfig
from jaxllm.sharding.mesh import make_mesh
from jaxllm.tune import main as tune

LINES = ["the cat sat on the mat", "a dog ran to the house", "where is the ball?", "der Ball ist im Haus", "ein Hund"]
TEXTS = ["the dog sat", "where is the cat on the mat of the house?"]


def spm(**options):
    """Return a SentencePiece model of a few lines."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 4), model_writer=out, model_type="unigram", hard_vocab_limit=False,
        minloglevel=2, **options,
    )  # fmt: skip
    return out.getvalue()


@pytest.fixture(scope="module")
def t5_files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("t5")
    proto = spm(vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    (directory / "spiece.model").write_bytes(proto)
    (directory / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 3}))
    return directory


@pytest.fixture(scope="module")
def marian_files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("marian")
    names = set()
    for name in ("source.spm", "target.spm"):
        (directory / name).write_bytes(proto := spm(vocab_size=50 if name == "source.spm" else 44))
        model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        names |= {model.id_to_piece(i) for i in range(3, model.get_piece_size())}
    order = ["</s>", "<unk>", ">>deu<<", *sorted(names), "<pad>"]
    (directory / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(order)}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"source_lang": "en", "target_lang": "de"}))
    return directory


def model(tokenizer, kind):
    """Return a model of random weights for a tokenizer."""
    shared = {"vocab_size": tokenizer.size, "d_model": 16, "n_heads": 2, "d_ff": 24, "max_seq_len": 48}
    if kind == "t5":
        shared |= {
            "positions": RelativeBias(buckets=8, max_distance=10), "ffn": Plain(activation="relu"), "score_scale": 1.0,
            "max_seq_len": 32768,
        }  # fmt: skip
    else:
        shared |= {
            "norm": LayerNorm(), "norm_placement": "post", "bias": True, "ffn": Plain(activation="gelu"),
            "positions": Learned(offset=2) if kind == "bart" else Sinusoids(interleaved=False),
            "embed_norm": kind == "bart",
        }  # fmt: skip
    stack = ModelConfig(n_layers=2, tie_embeddings=True, **shared)
    config = Seq2SeqConfig(
        encoder=stack, decoder=stack, start_token=tokenizer.pad_id, logit_bias=kind != "t5",
        logit_scale=0.25 if kind == "t5" else None,
    )  # fmt: skip
    draw = np.random.default_rng(0)
    params = map_named(
        lambda name, leaf: jnp.asarray(draw.normal(name.endswith("scale"), 0.3, leaf.shape), jnp.float32),
        abstract_params(config),
    )
    return EncoderDecoder(config, params, tokenizer, stop_ids=[tokenizer.eos_id])


@pytest.fixture(scope="module", params=["t5", "marian"])
def lm(request, t5_files, marian_files):
    return model(TextPieces(t5_files if request.param == "t5" else marian_files), request.param)


one_model = pytest.mark.parametrize("lm", ["t5"], indirect=True)  # of what does not depend on it


def test_targets_do_not_depend_on_the_batch_and_are_seed_exact(lm):
    sampler = Sampler(temperature=1.0, seed=4)
    both = lm.generate(TEXTS, max_new_tokens=8, sampler=sampler, num_samples=2)
    assert [(each.prompt, each.sample) for each in both] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    alone = lm.generate(TEXTS[1], max_new_tokens=8, sampler=sampler, num_samples=2)
    assert [each.text for each in alone] == [each.text for each in both[2:]]
    assert both[0].tokens != both[1].tokens


def test_the_logits_of_padded_rows_are_those_of_rows_alone(lm):
    long, short = (each.ids for each in lm.tokenizer.encode(TEXTS[::-1], 99))
    rows = np.zeros((2, len(long)), int)
    rows[0], rows[1, : len(short)] = long, short
    mask = np.array([[1] * len(long), [1] * len(short) + [0] * (len(long) - len(short))])
    targets = np.array([[lm.config.start_token, 5, 7]] * 2)
    together = lm.logits(rows, mask, targets=targets)
    alone = lm.logits(np.array([short]), targets=targets[:1])
    np.testing.assert_allclose(together[1], alone[0], atol=1e-5)


def test_an_export_is_loaded_again_bitwise_and_says_the_same(lm, tmp_path):
    jaxllm.export(lm, tmp_path / "hf")
    again = jaxllm.load(tmp_path / "hf")
    assert isinstance(again, jaxllm.EncoderDecoder)
    for name, leaf in named_leaves(lm.params).items():
        np.testing.assert_array_equal(named_leaves(again.params)[name], leaf, err_msg=name)
    assert again.generate(TEXTS, max_new_tokens=6) == lm.generate(TEXTS, max_new_tokens=6)


@one_model
def test_spread_over_a_mesh_it_says_the_same(lm, tmp_path):
    jaxllm.export(lm, tmp_path / "hf")
    spread = jaxllm.load(tmp_path / "hf", mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert not spread.params["decoder"]["blocks"]["ffn"]["up"]["kernel"].sharding.is_fully_replicated
    with jax.default_matmul_precision("highest"):
        assert [x.tokens for x in spread.generate(TEXTS)] == [x.tokens for x in lm.generate(TEXTS)]


def test_without_its_tokenizer_it_has_logits_and_says_what_is_missing(lm, tmp_path):
    path = jaxllm.export(lm, tmp_path / "hf")
    for name in lm.tokenizer.files:
        (path / name).unlink()
    again, ids = jaxllm.load(path), np.array([[4, 5, 6]])
    np.testing.assert_array_equal(again.logits(ids, targets=ids), lm.logits(ids, targets=ids))
    assert again.stop_ids == lm.stop_ids
    with pytest.raises(ValueError, match=r"no tokenizer\.json .*spiece\.model or source\.spm.*Without a tokenizer"):
        again.generate(TEXTS)
    (path / "source.spm").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has no target\.spm and no vocab\.json, which its tokenizer is made of"):
        jaxllm.load(path).generate(TEXTS)


def test_ids_of_sentencepiece_files_are_those_of_transformers(t5_files, marian_files, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="pip install 'jaxllm[parity]' compares with transformers")
    runtime = pytest.importorskip("google.protobuf.runtime_version", reason="pip install protobuf: for T5Tokenizer")
    try:
        importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except runtime.VersionError:  # made for protobuf 7, where Beam wants 6: transformers has an older one of its own
        older = importlib.import_module("transformers.utils.sentencepiece_model_pb2_new")
        slow = importlib.import_module("transformers.convert_slow_tokenizer")
        monkeypatch.setattr(slow, "import_protobuf", lambda: older)
    theirs = transformers.T5Tokenizer.from_pretrained(t5_files, extra_ids=3)
    ours = TextPieces(t5_files)
    assert [each.ids for each in ours.encode(TEXTS, 99)] == [theirs(text)["input_ids"] for text in TEXTS]
    asked = "the <extra_id_0> sat"
    assert ours.encode([asked], 99, special=True)[0].ids == theirs(asked)["input_ids"]
    theirs, ours = transformers.MarianTokenizer.from_pretrained(marian_files), TextPieces(marian_files)
    for text in (*TEXTS, ">>deu<< where is the ball?"):
        ids = ours.encode([text], 99)[0].ids
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)  # with pieces of the source model alone
    german = theirs(text_target="der Ball ist im Haus")["input_ids"]
    assert ours.decode(german) == theirs.decode(german, skip_special_tokens=True) == "der Ball ist im Haus"


def test_a_broken_sentencepiece_model_is_named(marian_files, tmp_path):
    shutil.copytree(marian_files, tmp_path / "m")
    (tmp_path / "m/target.spm").write_bytes((tmp_path / "m/target.spm").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"target\.spm is no SentencePiece model \(500 bytes\)"):
        TextPieces(tmp_path / "m")


def test_sentencepiece_files_alone_are_enough_to_tune_on_pairs_in_their_ids(lm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jaxllm.export(before := lm, "hf")
    rows = [{"x": "where is the ball?", "y": "der Ball ist im Haus"}, {"x": "a dog", "y": "ein Hund"}] * 5
    with open("rows.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    flags = ["--jsonl", "rows.jsonl:x,y", "--tokenizer", "hf", "--validation", "2", "--out", "data"]
    assert prepare(["--chat", *flags, "clean.deduplicate=false"]) is None
    still = ["steps=1", "optim.lr=1e-9", "data.batch_size=8", "data.threads=0", "platform.compile_cache=none"]
    recipe = [str(shipped("translation-tune.yaml")), "start_from=hf", "data.sources.0.path=data", "out=run"]
    assert tune([*recipe, "data.packing.seq_len=32", *still]) == 0
    row = Loader(load_recipe("run").data).row(0)
    source, target = row.sources[row.source_segments == 1].tolist(), row.targets[row.segments == 1].tolist()
    after = jaxllm.load("run")
    assert source in [after.encode(row["x"]) for row in rows]
    assert after.tokenizer.decode(target) in [row["y"] for row in rows]
    assert target[-1] == before.tokenizer.eos_id
    assert after.tokenizer._unknown not in target[:-1]
    assert [x.tokens for x in after.generate(TEXTS)] == [x.tokens for x in before.generate(TEXTS)]


def test_bart_begins_with_its_forced_token(t5_files, tmp_path):
    tokenizer = TextPieces(t5_files)
    bart = model(tokenizer, "bart")
    forced = EncoderDecoder(bart.config, bart.params, tokenizer, stop_ids=bart.stop_ids, forced=[7])
    jaxllm.export(forced, tmp_path / "hf")
    again = jaxllm.load(tmp_path / "hf")
    assert again.forced == (7,)
    answer = again.generate(TEXTS[0], max_new_tokens=1)[0].tokens
    ids = tokenizer.encode([TEXTS[0]], 99)[0].ids
    logits = bart.logits(np.array([ids]), targets=np.array([[tokenizer.pad_id, 7]]))
    assert answer == [int(logits[0, 1].argmax())]


ASKED = {
    "num_beams": 3, "length_penalty": 0.6, "early_stopping": True, "no_repeat_ngram_size": 2, "max_length": 14,
    "min_length": 4, "bad_words_ids": [[3], [4, 5]], "renormalize_logits": True, "use_cache": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def asking(lm, tmp_path_factory):
    """Return the directory of a model whose generation_config.json asks for a search, and the model."""
    path = tmp_path_factory.mktemp("asking") / "hf"
    eos = lm.tokenizer.eos_id
    asked = ASKED | {"forced_eos_token_id": eos, "forced_bos_token_id": 6}
    jaxllm.export(
        EncoderDecoder(lm.config, lm.params, lm.tokenizer, stop_ids=[eos], forced=[6], asked=asked), path
    )  # fmt: skip
    return path, jaxllm.load(path)


def test_converted_to_a_run_and_back(asking, tmp_path, capsys):
    path, lm = asking
    assert convert([str(path), str(tmp_path / "run")]) is None
    assert convert([str(tmp_path / "run"), str(tmp_path / "again")]) is None
    assert capsys.readouterr().out.count("to the last bit") == 2
    for file in ("config.json", "model.safetensors", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (path / file).read_bytes(), file
    run = jaxllm.load(tmp_path / "run")
    assert (run.search, run.stop_ids, run.forced) == (lm.search, lm.stop_ids, (6,))
    assert run.generate(TEXTS, num_samples=2) == lm.generate(TEXTS, num_samples=2)


def test_what_a_checkpoint_asks_for_is_what_transformers_does_with_it(asking):
    transformers = pytest.importorskip("transformers", reason="pip install 'jaxllm[parity]' compares with transformers")
    torch = pytest.importorskip("torch", reason="pip install 'jaxllm[parity]' compares with torch")
    path, lm = asking
    assert lm.asked.items() >= ASKED.items()
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(path).eval()
    found = lm.generate(TEXTS, num_samples=3)
    assert [(each.prompt, each.sample) for each in found] == [(p, i) for p in (0, 1) for i in range(3)]
    for index, text in enumerate(TEXTS):
        ids = torch.tensor([lm.tokenizer.encode([text], 99)[0].ids])
        written = theirs.generate(ids, num_return_sequences=3, pad_token_id=lm.tokenizer.pad_id).tolist()
        for row, each in zip(written, found[3 * index :], strict=False):
            whole = [lm.config.start_token, 6, *each.tokens]
            assert whole == row[: len(whole)]
            assert set(row[len(whole) :]) <= {lm.tokenizer.pad_id, lm.tokenizer.eos_id}
        wider = theirs.generate(ids, num_beams=5, length_penalty=2.0)[0].tolist()
        assert lm.generate(text, num_beams=5, length_penalty=2.0)[0].tokens == wider[2:]
        greedy = theirs.generate(ids, num_beams=1, early_stopping=False)[0].tolist()
        assert lm.generate(text, num_beams=1)[0].tokens == greedy[2:]


def run(capsys, *argv):
    status = sample.main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@one_model
def test_the_command_line_says_what_python_says(asking, capsys, tmp_path, monkeypatch):
    path, lm = asking
    best = [each.text for each in lm.generate(TEXTS)]
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    _, out, _ = run(capsys, path, "--prompts", tmp_path / "texts.txt", "--json")
    assert [json.loads(line)["text"] for line in out.splitlines()] == best
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXTS[0].encode())))
    assert run(capsys, path)[1] == best[0] + "\n"
    assert run(capsys, path, "--prompt", TEXTS[0], "--stream")[1] == best[0] + "\n"
    wide = lm.generate(TEXTS[0], num_beams=5, length_penalty=2.0)[0].text
    assert run(capsys, path, "--prompt", TEXTS[0], "--num-beams", 5, "--length-penalty", 2)[1] == wide + "\n"
    greedy = lm.generate(TEXTS[0], num_beams=1)[0].text
    for flags in ([], ["--stream"]):
        assert run(capsys, path, "--prompt", TEXTS[0], "--num-beams", 1, *flags)[1] == greedy + "\n"
    drawn = lm.generate(TEXTS[0], sampler=Sampler(temperature=1.5, top_k=9, seed=3), num_samples=2)
    flags = ["--temperature", 1.5, "--top-k", 9, "--seed", 3, "--num-samples", 2, "--json"]
    _, out, _ = run(capsys, path, "--prompt", TEXTS[0], *flags)
    assert [json.loads(line)["text"] for line in out.splitlines()] == [each.text for each in drawn]


@one_model
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chat"], "holds no conversation; leave out --chat"),
        (["--prompt", "a", "--system", "b"], "knows no system message; leave out --system"),
        (["--prompt", "a", "--num-beams", "4", "--temperature", "1"], "num_beams=4 looks for the likeliest answer"),
        (["--prompt", "a", "--num-beams", "0"], "num_beams=0: should be greater than or equal to 1"),
        (["--prompt", "a", "--num-beams", "2", "--stream"], "--stream shows tokens as they come"),
        (["--prompt", "a", "--num-beams", "1", "--length-penalty", "2"], "--length-penalty counts in a search alone"),
        (["--prompt", "a", "--num-samples", "4"], "num_samples=4 must be at least 1 and at most num_beams=3"),
    ],
)
def test_flags_that_mean_nothing_are_refused(asking, capsys, flags, message):
    status, out, err = run(capsys, asking[0], *flags)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


@one_model
def test_a_text_that_is_too_long_is_named_by_its_line(asking, capsys, tmp_path):
    longest = asking[1].config.encoder.max_seq_len
    (tmp_path / "texts.txt").write_text("a\n" + "the cat " * longest)
    _, _, err = run(capsys, asking[0], "--prompts", tmp_path / "texts.txt")
    assert "texts.txt, line 2 has" in err
    assert f"the model takes at most {longest}" in err


@one_model
def test_what_a_checkpoint_asks_for_and_nothing_computes_is_refused(asking):
    _, lm = asking
    other = EncoderDecoder(lm.config, lm.params, lm.tokenizer, stop_ids=lm.stop_ids, asked={"num_beam_groups": 2})
    with pytest.raises(ValueError, match="asks for num_beam_groups=2, which is not computed here"):
        other.generate(TEXTS)
    other.search, other.sampler = lm.search, lm.sampler
    assert other.generate(TEXTS[0], num_beams=1, max_new_tokens=2)


def test_only_without_a_generation_config_its_words_in_config_json_count(asking, tmp_path):
    path, _ = asking
    copied = shutil.copytree(path, tmp_path / "hf")
    raw = json.loads((copied / "config.json").read_text())
    raw |= {"num_beams": 2, "max_length": 9, "forced_bos_token_id": 7}
    (copied / "config.json").write_text(json.dumps(raw))
    what = lambda lm: (lm.search.num_beams, lm.search.max_new_tokens, lm.search.length_penalty, lm.forced)
    assert what(jaxllm.load(copied)) == (3, 13, 0.6, (6,))
    (copied / "generation_config.json").unlink()
    again = jaxllm.load(copied)
    assert what(again) == (2, 8, 1.0, (7,))
    transformers = pytest.importorskip("transformers", reason="pip install 'jaxllm[parity]' compares with transformers")
    torch = pytest.importorskip("torch", reason="pip install 'jaxllm[parity]' compares with torch")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(copied).eval()
    written = theirs.generate(torch.tensor([again.encode(TEXTS[0])]))[0].tolist()
    assert [again.config.start_token, 7, *again.generate(TEXTS[0])[0].tokens] == written
    raw |= {"force_bos_token_to_be_generated": True, "bos_token_id": 5}  # of old files, where both are said
    (copied / "config.json").write_text(json.dumps(raw))
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(copied)
    assert jaxllm.load(copied).forced == (theirs.generation_config.forced_bos_token_id,) == (5,)


def test_a_streamed_target_and_one_that_is_stopped_are_the_beginning_of_the_whole(lm):
    sampler = Sampler(temperature=1.0, seed=7)  # with which no model ends at once
    whole = lm.generate(TEXTS[0], max_new_tokens=20, sampler=sampler)[0].text
    assert len(whole) > 20
    assert "".join(lm.stream(TEXTS[0], max_new_tokens=20, sampler=sampler)) == whole
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    cut = lm.generate(TEXTS[0], max_new_tokens=20, sampler=sampler, stop=[stop])[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert "".join(lm.stream(TEXTS[0], max_new_tokens=20, sampler=sampler, stop=[stop])) == cut.text


@one_model
def test_what_cannot_be_read_is_a_clear_error(lm, tmp_path):
    with pytest.raises(ValueError, match="no texts; give at least one"):
        lm.generate([])
    with pytest.raises(ValueError, match="text 0 is a pair"):
        lm.tokenizer.encode([("a", "b")], 9)
    with pytest.raises(ValueError, match=r"text 1 has \d+ tokens and the model takes 5"):
        lm.tokenizer.encode(["a", TEXTS[1]], 5)
    assert len(lm.tokenizer.encode([TEXTS[1]], 5, truncate=True)[0].ids) == 5
    jaxllm.export(lm, tmp_path / "hf")
    with pytest.raises(ValueError, match="has an encoder; jaxllm"):
        look(tmp_path / "hf")
