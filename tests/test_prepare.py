import gzip
import json
import subprocess
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from jaxllm import inspect, prepare, train
from jaxllm.data.shards import Dataset


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"line number {number} says hello" for number in range(60)))
    return path


def test_flags_make_a_dataset(text, tmp_path, capsys):
    out = tmp_path / "d"
    flags = ["--text", str(text), "--split", "line", "--tokenizer", "bpe", "--vocab-size", "320", "--out", str(out)]
    assert prepare.main([*flags, "--validation", "5", "--seq-len", "32", "clean.min_chars=2"]) is None
    assert "60 read, 60 kept" in capsys.readouterr().out
    assert len(Dataset.open(out, "validation")) == 5
    assert prepare.main(flags) == 2
    assert f"error: {out} exists; choose another directory, or --overwrite" in capsys.readouterr().err
    assert prepare.main([*flags, "--overwrite"]) is None
    chat = ["--chat", "--world", "40", "--tokenizer", str(out), "--out", str(tmp_path / "c")]
    assert prepare.main(chat) is None
    assert Dataset.open(tmp_path / "c").kind == "chat"
    assert Dataset.open(tmp_path / "c").tokenizer_fingerprint == Dataset.open(out).tokenizer_fingerprint


def test_notes_say_what_is_not_held_out_and_what_helps(tmp_path, capsys):
    def notes(*flags: str) -> str:
        assert prepare.main([*flags, "--tokenizer", "bytes", "--overwrite", "--out", str(tmp_path / "d")]) is None
        return " ".join(capsys.readouterr().out.split())

    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("a long text \n\n" * 5000)
    (tmp_path / "s.jsonl").write_text('{"text": "short", "instruction": "Go.", "output": "I go."}\n' * 600)
    rows, texts = ["--jsonl", str(tmp_path / "s.jsonl")], ["--text", str(tmp_path / "[0-3].txt")]
    found = notes(*rows, *texts, "clean.deduplicate=false")
    assert ", where 1.00% of the documents were asked for: the long ones are not among them; cut finer (--sp" in found
    assert "held out" not in notes(*rows, "clean.deduplicate=false")
    assert "there is only 1, so training has no validation loss; add documents to get one" in notes("--chat", *rows)
    assert prepare.main([*rows, "--validation", "2000", "--tokenizer", "bytes", "--out", str(tmp_path / "e")]) == 2
    assert "left for training beside the 1 document held out; lower --validation\n" in capsys.readouterr().err


RECIPE = """
out: {run}
steps: 2
model: {{preset: tiny, n_layers: 1, d_model: 32, n_heads: 2, n_kv_heads: 2, d_ff: 48, vocab_size: 262}}
data: {{sources: [{{path: {data}}}], packing: {{seq_len: 64}}, batch_size: 8, threads: 0}}
monitor: {{log_every: 1}}
platform: {{compile_cache: null}}
"""


@pytest.mark.parametrize(("size", "split"), [(40, "file"), (10_000_000, "line")], ids=["one line", "a line of 10 MB"])
def test_one_line_is_prepared_and_trained_on(tmp_path, capsys, size, split):
    (tmp_path / "a.txt").write_bytes((b"all on one line; " * (size // 17 + 1))[:size])
    flags = ["--text", str(tmp_path / "a.txt"), "--split", split, "--tokenizer", "bytes", "--seq-len", "64"]
    assert prepare.main([*flags, "--out", str(tmp_path / "d")]) is None
    assert "no document is held out: there is only 1" in capsys.readouterr().out.replace("\n", " ")
    data = Dataset.open(tmp_path / "d")
    assert data.lengths.tolist() == [size + 2]
    (tmp_path / "r.yaml").write_text(RECIPE.format(run=tmp_path / "run", data=tmp_path / "d"))
    assert train.main([str(tmp_path / "r.yaml")]) == 0
    assert capsys.readouterr().out.count("no validation split: the data has no held-out documents") == 1
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]  # and no validation loss
    losses = [record["loss"] for record in records]
    assert losses == pytest.approx([5.57, 5.57], abs=0.3)  # ln 262
    for step, note in (("2", ""), ("3", f"note: step 3 is beyond the end of {tmp_path / 'run'}, which has 2 steps; ")):
        capsys.readouterr()
        assert inspect.main([str(tmp_path / "run"), "--step", step]) is None
        told = capsys.readouterr().err
        assert told.startswith(note) and told.count("\n") == bool(note)


def test_recipe_makes_a_dataset(text, tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"inputs:\n- kind: text\n  path: {text}\n  split: line\ntokenizer: {{kind: bytes}}\nout: {tmp_path / 'd'}\n"
    )
    assert train.main([str(recipe)]) == 2
    assert f"{recipe} is a recipe of prepare; run: python -m jaxllm.prepare {recipe}\n" in capsys.readouterr().err
    assert prepare.main([str(recipe), "validation=3"]) is None
    assert len(Dataset.open(tmp_path / "d", "validation")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--txt", "a"], "unknown flag --txt; did you mean --text?"),
        (["--text", "none.txt", "--out", "d"], "no file matches 'none.txt'"),
        (["--world", "5"], "missing key 'out'; give --out DIR on the command line, or"),
        (["--out", "d"], "missing key 'inputs'; give --text FILE, --jsonl FILE or another input"),
        (["--world", "5", "--split", "line", "--out", "d"], "--split is for --text, --markdown, and there is none"),
        (["r.yaml", "--world", "5"], "sources are given twice: in r.yaml and as flags"),
        (["a.txt", "b.txt"], "one RECIPE.yaml is expected, or flags alone, but not a.txt, b.txt; quote the pattern"),
        (["--text", "a", "b", "--out", "d"], "or flags alone, but not b; quote the pattern"),
        (["--text", "a", "b", "c", *"defg"], "but not b, c and 4 more; quote the pattern, so that the shell does not"),
        (["--pydocs", "foo", "--out", "d"], "or flags alone, but not foo; quote"),
        (["train.yaml"], "train.yaml is a recipe of train; run: python -m jaxllm.train train.yaml"),
        (["tune.yaml", "out=x"], "tune.yaml is a recipe of tune; run: python -m jaxllm.tune tune.yaml"),
        (["--chat", "--jsonl", "q.jsonl:question", "--out", "d"], "a conversation has two fields, PROMPT,ANSWER (or"),
        (["--chat", "--jsonl", "q.jsonl:a,b,c", "--out", "d"], "--jsonl q.jsonl:a,b,c: a conversation has two fields"),
        (["--jsonl", "a.jsonl", "--out", "d"], "has 'instruction', 'output'; for conversations, give --chat"),
        (
            ["--chat", "--jsonl", "a.jsonl:q,a", "--out", "d"],
            "in field 'q': the row has 'instruction', 'output'; repair",
        ),
        (["--world", "0", "--out", "d"], "inputs.0.count=0: should be greater than or equal to 1"),
    ],
)
def test_user_errors_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.yaml").write_text(RECIPE.format(run="r", data="d"))
    (tmp_path / "tune.yaml").write_text(RECIPE.format(run="r", data="d") + "start_from: x\n")
    (tmp_path / "a.jsonl").write_text('{"instruction": "q", "output": "a"}\n')
    (tmp_path / "q.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    assert prepare.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_help_lists_flags_and_keys_and_stays_light(capsys):
    assert prepare.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "--jsonl PATH[:FIELDS]" in out
    assert "tokenizer.vocab_size" in out
    code = (
        "import sys; from jaxllm import inspect, prepare; prepare.main(['--help']); "
        "sys.exit(any(name in sys.modules for name in ('jax', 'grain', 'orbax', 'sentencepiece', 'jinja2')))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_sources_of_many_kinds_from_flags_and_from_a_recipe(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = b"".join(json.dumps({"body": f"row {n} of the file", "id": n}).encode() + b"\n" for n in range(3))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows + b"{"))
    parquet.write_table(pa.table({"text": ["one of parquet"], "url": ["http://x"]}), "a.parquet")
    (tmp_path / "a.md").write_text("---\ntitle: A\n---\n# The head\n\nand a text\n")
    flags = ["--jsonl", "a.jsonl.gz:body", "--parquet", "a.parquet", "--markdown", ".", "--split", "paragraph"]
    flags += ["--errors", "skip", "--tokenizer", "bytes", "--validation", "0", "--out"]
    assert prepare.main([*flags, "d", "--world", "1"]) is None
    assert "a.jsonl.gz:4: not JSON" in capsys.readouterr().out.replace("\n", "")
    data = Dataset.open("d")
    assert [data.origin(n) for n in range(7)] == [
        {"source": "./a.md", "location": "line 4", "offset": 17},
        {"source": "./a.md", "location": "line 6", "offset": 29},
        {"source": "a.jsonl.gz", "location": "line 1", "offset": 0, "id": "0"},
        {"source": "a.jsonl.gz", "location": "line 2", "offset": 39, "id": "1"},
        {"source": "a.jsonl.gz", "location": "line 3", "offset": 78, "id": "2"},
        {"source": "a.parquet", "location": "row 0", "id": "http://x"},
        {"source": "world", "location": "seed 0, document 0"},
    ]
    assert inspect.main(["d", "--rows", "1", "--seq-len", "400"]) is None
    assert "document 5, a.parquet, row 0, id http://x" in capsys.readouterr().out
    (tmp_path / "r.yaml").write_text(
        "inputs: [{kind: markdown, path: ., split: paragraph}, {kind: jsonl, path: a.jsonl.gz, fields: body},"
        "{kind: parquet, path: a.parquet}, {kind: world, count: 1}]\n"
        "errors: skip\ntokenizer: {kind: bytes}\nvalidation: 0\nout: e\n"
    )
    assert prepare.main(["r.yaml"]) is None
    assert Dataset.open("e").fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("flag", "given", "expected"),
    [
        ("jsonl", "gs://b/a.jsonl:f", {"path": "gs://b/a.jsonl", "fields": "f"}),
        ("jsonl", "gs://b/a.jsonl", {"path": "gs://b/a.jsonl", "fields": None}),
        ("parquet", r"C:\a.parquet:p,a", {"path": r"C:\a.parquet", "fields": "p,a"}),
        ("html", "odd:name.html", {"path": "odd:name.html"}),
        ("tfds", "a/b:1.0.0:f", {"name": "a/b:1.0.0", "fields": "f"}),
        ("tfds", "a:1.0.0", {"name": "a:1.0.0", "fields": None}),
        ("tfds", "a:f", {"name": "a", "fields": "f"}),
    ],
)
def test_names_and_fields_in_flags(flag, given, expected):
    expected = {"kind": flag, **expected}
    found = prepare._inputs(prepare._parser().parse_args([f"--{flag}", given]))
    assert found == [f"inputs.0.{key}={value}" for key, value in expected.items() if value]


def test_inspect_shows_a_dataset(text, tmp_path, capsys):
    out = tmp_path / "d"
    prepare.main(["--text", str(text), "--split", "line", "--tokenizer", "bytes", "--out", str(out)])
    capsys.readouterr()
    assert inspect.main([str(out), "--rows", "2", "--seq-len", "40"]) is None
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == "⟦ ⟧: trained, the rest is only read"
    assert "<bos>⟦line number" in shown
    assert shown.count("sample") == 2
    assert "line number" in shown
    assert "a.txt" in shown
    code = f"import sys; from jaxllm import inspect; sys.exit(inspect.main([{str(out)!r}, '--rows', '99']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as `| head -1` does
        assert process.stderr.read() == b""
    assert inspect.main([str(out), "--step", "1"]) == 2
    assert "--step needs a run directory" in capsys.readouterr().err
    for wrong, said in {
        (str(tmp_path),): f"{tmp_path} is no dataset (no manifest.json) and no run directory (no recipe.yaml)",
        (
            f"{tmp_path}/nope",
        ): f"{tmp_path}/nope does not exist; give a dataset, written by prepare, or a run directory",
        (str(out), "--seq-len", "1"): "--seq-len=1: a row has at least 2 tokens, one of which is learned",
    }.items():
        assert inspect.main([*wrong]) == 2
        assert capsys.readouterr().err == f"error: {said}\n"


def test_inspect_tells_special_tokens_from_text_that_spells_them_and_shows_no_row_twice(tmp_path, capsys):
    row = {"instruction": "Say <|assistant|>, <bos> and <x>.", "output": "<eos>"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--chat", "--jsonl", str(tmp_path / "a.jsonl"), "--tokenizer", "bytes"]
    prepare.main([*flags, "--out", str(tmp_path / "d")])
    capsys.readouterr()
    assert inspect.main([str(tmp_path / "d")]) is None
    _, *rows, padding = capsys.readouterr().out.splitlines()
    assert "".join(rows[2:]) == r"<bos><|user|>Say <\|assistant|>, <\bos> and <x>.<|assistant|>⟦<\eos><eos>⟧"
    assert padding.endswith("of padding")
    inspect.main([str(tmp_path / "d"), "--json"])
    [document] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "Say <|assistant|>, <bos>" in "".join(text for text, _, _ in document["tokens"])
