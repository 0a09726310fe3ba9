import io
import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import pytest

from jaxllm import sample
from jaxllm.data.tokenizers.tokenizer import byte_tokenizer
from jaxllm.inference.sampling import Sampler
from jaxllm.language_model import LanguageModel
from jaxllm.models.build import init_params
from jaxllm.models.config import ModelConfig

CONFIG = ModelConfig(vocab_size=262, d_model=16, n_layers=1, n_heads=2, d_ff=16, max_seq_len=128)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "run"
    params = jax.jit(lambda: jax.tree.map(lambda leaf: leaf * 6, init_params(CONFIG, 0)))()
    LanguageModel(CONFIG, params, byte_tokenizer(), chat=True).save(directory)
    return str(directory)


def outcome(capsys, *argv):
    status = sample.main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_json_lines_hold_every_answer_in_order(run, capsys, tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo \u00e9\n")
    status, out, _ = outcome(
        capsys, run, "--prompts", tmp_path / "p.txt", "--json", "--num-samples", 2, "--max-new-tokens", 5
    )
    lines = [json.loads(line) for line in out.splitlines()]
    assert status is None
    assert [(line["prompt"], line["sample"]) for line in lines] == [
        (p, i) for p in ("one", "two \u00e9") for i in (0, 1)
    ]
    assert all(line.keys() == {"prompt", "text", "tokens", "finish_reason", "sample"} for line in lines)
    assert all(1 <= line["tokens"] <= 5 for line in lines)


def test_stream_prints_what_generate_prints(run, capsys):
    arguments = [run, "--prompt", "hi", "--max-new-tokens", 6, "--temperature", 1, "--seed", 4]
    assert outcome(capsys, *arguments)[1] == outcome(capsys, *arguments, "--stream")[1]


START, WIPE = "\x1b[?25l", "\x1b[1A\x1b[2K"  # a status hides the cursor, and in the end clears its line


class Terminal(io.StringIO):
    def __init__(self, monkeypatch):
        super().__init__()
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr("sys.stderr", self)

    def isatty(self):
        return True


@pytest.mark.parametrize("flags", [[], ["--stream"]])
def test_a_terminal_shows_what_takes_so_long_and_standard_output_stays_the_same(run, capsys, monkeypatch, flags):
    arguments = [run, "--prompt", "hi", "--max-new-tokens", 4, "--temperature", 0, *flags]
    _, expected, nothing = outcome(capsys, *arguments)
    terminal = Terminal(monkeypatch)
    assert outcome(capsys, *arguments)[1] == expected
    assert nothing == ""
    before, loading, answering = terminal.getvalue().split(START)
    assert before == ""
    assert "loading" in loading and loading.endswith(WIPE)
    assert "answering" in answering and answering.endswith(WIPE)


def test_a_mistake_wipes_out_the_status(monkeypatch):
    terminal = Terminal(monkeypatch)
    assert sample.main(["nowhere", "--prompt", "x"]) == 2
    loading, _, error = terminal.getvalue().rpartition(WIPE)
    assert "loading nowhere ..." in loading
    assert re.fullmatch(r"error: nowhere does not exist.*\n", error)


def test_raw_differs_from_the_template(run, capsys):
    arguments = [run, "--prompt", "hi", "--max-new-tokens", 6, "--temperature", 0]
    assert outcome(capsys, *arguments)[1] != outcome(capsys, *arguments, "--raw")[1]


def test_standard_input_is_a_prompt(run, capsys, monkeypatch):
    arguments = [run, "--max-new-tokens", 6, "--temperature", 0]
    expected = outcome(capsys, *arguments, "--prompt", "piped")[1]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfpiped\r\n")))
    assert outcome(capsys, *arguments)[1] == expected


def test_only_an_answer_that_is_compiled_is_said_to_be(run, monkeypatch):
    terminal = Terminal(monkeypatch)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/reset\nho\n"))
    assert sample.main([run, "--chat", "--max-new-tokens", "50", "--temperature", "0"]) is None
    _, _, first, second = terminal.getvalue().split(START)
    assert "answering (compiling) ..." in first
    assert "compiling" not in second


class Parrot:
    """A model whose answer is how many messages it was given."""

    tokenizer, is_chat, config = byte_tokenizer(), True, CONFIG

    def encode(self, messages):
        return [1] * 22 * len(messages)

    def stream(self, messages, **options):
        yield from (str(len(messages)), messages[0]["content"])


def test_a_conversation_remembers_resets_and_ends(capsys, monkeypatch):
    arguments = SimpleNamespace(model="m", system="S", max_new_tokens=4, stop=[])
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n\nb\n/reset\nc\n/exit\nnever\n"))
    sample.converse(Parrot(), arguments, Sampler())
    out = capsys.readouterr().out
    assert [line.removeprefix("> ").removeprefix("> ") for line in out.splitlines()[1:]][:4] == [
        "2S", "4S", "(the conversation starts over)", "2S",
    ]  # fmt: skip


class Silent(Parrot):
    """A model that ends its answers before the first word."""

    def encode(self, prompt):
        return [1]

    def generate(self, requests, **options):
        return [SimpleNamespace(prompt=i, text=text, tokens=[1], sample=0, finish_reason="stop")
                for i, text in enumerate(("word", " ")[-len(requests):])]  # fmt: skip

    def stream(self, messages, **options):
        yield from ()


def test_an_empty_answer_is_said_in_a_conversation_and_noted_beside_text(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
    sample.converse(Silent(), SimpleNamespace(model="m", system=None, max_new_tokens=4, stop=[]), Sampler())
    assert "> (empty answer)\n" in capsys.readouterr().out
    monkeypatch.setattr(sample, "_load", lambda _: (Silent(), Sampler()))
    note = "note: the answer to the prompt of --prompt is empty\n"
    assert outcome(capsys, "m", "--prompt", "x") == (None, " \n", note)
    assert outcome(capsys, "m", "--prompt", "x", "--stream") == (None, "\n", note)
    _, out, err = outcome(capsys, "m", "--prompt", "x", "--json")
    assert (json.loads(out)["text"], err) == (" ", "")


@pytest.mark.parametrize(
    ("is_chat", "flags", "message"),
    [
        (False, [], "m was never tuned on conversations and knows no system message; leave out --system\n"),
        (True, ["--raw"], "--raw takes no system message; leave out --system or --raw\n"),
    ],
)
def test_why_there_is_no_system_message_is_said(capsys, monkeypatch, is_chat, flags, message):
    model = Silent()
    model.is_chat = is_chat
    monkeypatch.setattr(sample, "_load", lambda _: (model, Sampler()))
    assert outcome(capsys, "m", "--prompt", "x", "--system", "b", *flags) == (2, "", "error: " + message)


def test_what_begins_like_a_command_is_not_said_to_the_model_and_one_never_tuned_is_announced(capsys, monkeypatch):
    arguments = SimpleNamespace(model="m", system=None, max_new_tokens=4, stop=[])
    model = Parrot()
    model.is_chat = False
    monkeypatch.setattr("sys.stdin", io.StringIO("/quit\na\n"))
    sample.converse(model, arguments, Sampler())
    out = capsys.readouterr().out
    assert "never tuned on conversations" in out
    assert "(/quit is no command; /reset starts over" in out
    assert "> 1a\n" in out


def test_a_conversation_that_is_too_long_goes_on_and_ctrl_d_ends_it(capsys, monkeypatch):
    arguments = SimpleNamespace(model="m", system=None, max_new_tokens=4, stop=[])
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\nc\nd\n"))
    sample.converse(Parrot(), arguments, Sampler())
    full = "(the conversation is full: the model reads 127 tokens, and with this they are 154; /reset begins a new"
    assert capsys.readouterr().out.endswith(f"> 5a\n> {full} conversation)\n> \n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere", "--prompt", "x"], "nowhere does not exist"),
        (["m", "--promt", "x"], "unknown flag --promt; did you mean --prompt?"),
        (["m", "--prompt", "x", "--qq"], "unknown flag --qq; python -m jaxllm.sample --help lists all flags"),
        (["--raw"], "the following arguments are required: MODEL; python -m jaxllm.sample --help lists all"),
        (["m", "--prompt", " "], "prompt of --prompt is empty"),
        (["m", "--prompt", "x", "--prompts", "f"], "--prompt and --prompts are both given"),
        (["m", "--prompts", "no-such-file"], "No such file or directory: no-such-file"),
        (["m", "--prompt", "x", "--stream", "--json"], "--stream shows one answer"),
        (["m", "--prompt", "a\udcff"], "the prompt of --prompt has bytes that are not UTF-8"),
        (["m", "--chat", "--raw", "--num-samples", "2"], "would ignore --raw, --num-samples; leave out"),
        (["m", "--chat", "--prompt", "x", "--json", "--stream"], "would ignore --prompt, --stream, --json"),
        ([".", "--prompt", "x"], ". is no run directory (no recipe.yaml)"),
    ],
)
def test_mistakes_are_one_line(capsys, argv, message):
    status, out, err = outcome(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-p", "0"], "top_p=0.0: should be greater than 0"),
        (["--top-k", "0"], "top_k=0: should be greater than or equal to 1"),
        (["--temperature", "nan"], "temperature=nan: should be"),
        (["--min-p", "2"], "min_p=2.0: should be less than or equal to 1"),
        (["--repetition-penalty", "0"], "repetition_penalty=0.0: should be greater than 0"),
        (["--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
        (["--num-samples", "0"], "num_samples=0 must be at least 1"),
    ],
)
def test_impossible_numbers_are_one_line(run, capsys, flags, message):
    status, out, err = outcome(capsys, run, "--prompt", "x", *flags)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_other_fields_of_a_row_stay_with_its_answer(capsys, tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_text('{"id": 7, "prompt": "a", "text": "b"}\n{"prompt": "c", "id": 8}\n')
    monkeypatch.setattr(sample, "_load", lambda _: (Silent(), Sampler()))
    _, out, err = outcome(capsys, "m", "--prompts", tmp_path / "p.jsonl", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["id"], row["prompt"], row["text"]) for row in rows] == [(7, "a", "word"), (8, "c", " ")]
    assert err == ""


@pytest.mark.parametrize("text", ['{"question": "a"}\n', '[\n{"prompt": "a"}\n]\n'])
def test_a_file_of_json_that_is_read_as_lines_is_noted(capsys, tmp_path, monkeypatch, text):
    (tmp_path / "p.json").write_text(text)
    monkeypatch.setattr(sample, "_load", lambda _: (Silent(), Sampler()))
    status, _, err = outcome(capsys, "m", "--prompts", tmp_path / "p.json", "--json")
    assert status is None
    assert "p.json looks like JSON, and each of its lines is taken as it is for a prompt" in err


@pytest.mark.parametrize("row", ['{"text": "b"}', '{"prompt": 5}', "[1]", "{"])
def test_a_damaged_prompt_file_names_the_line(capsys, tmp_path, row):
    (tmp_path / "p.jsonl").write_text('\ufeff{"prompt": "a"}\n\n' + row + "\n", encoding="utf-8")
    assert "p.jsonl, line 3: expected {" in outcome(capsys, "m", "--prompts", tmp_path / "p.jsonl")[2]


def test_a_prompt_file_that_is_not_utf_8_is_named(capsys, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"good\n\xff\n")
    err = outcome(capsys, "m", "--prompts", tmp_path / "p.txt")[2]
    assert "p.txt is not UTF-8 at byte offset 5 (byte 0xff); save it as UTF-8" in err
    assert err.count("\n") == 1


def test_a_prompt_that_is_too_long_is_named_by_its_line(run, capsys, tmp_path):
    (tmp_path / "p.txt").write_text("short\n\n" + "long" * 40 + "\n")
    err = outcome(capsys, run, "--prompts", tmp_path / "p.txt", "--raw", "--num-samples", 3)[2]
    assert "p.txt, line 3 has 161 tokens; the model takes at most 127" in err


def test_help_is_quick_because_jax_is_not_imported():
    code = "import sys, jaxllm.sample\ntry: jaxllm.sample.main(['--help'])\nfinally: assert 'jax' not in sys.modules"
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert time.monotonic() - started < 20  # a second on a machine at rest
