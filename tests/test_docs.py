"""The documents cannot rot: every command, flag, key, path, link and Python name in them exists."""

import ast
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxllm.core import config as configs
from jaxllm.core.schema import keys
from jaxllm.data.prepare_config import PrepareConfig
from jaxllm.data.problems import Problems
from jaxllm.data.reading import sources
from jaxllm.recipe import Recipe, load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "BUILD.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
FENCE = re.compile(r"^(?P<mark><!-- run -->\n)?```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"python -m (jaxllm[\w.]*)((?:\\\n|[^`\n])*)")
COMMAND_IN_FENCE = re.compile(r"python -m (jaxllm[\w.]*)((?:\\\n|[^\n])*)")
OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)
OUR_FILE = re.compile(r"(?<![\w/.])(?:configs|docs|jaxllm|tests|tools)/[\w./-]*[\w/]")
SCHEMAS = {"jaxllm.train": Recipe, "jaxllm.tune": Recipe, "jaxllm.prepare": PrepareConfig}


def commands(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """(module, arguments) of every command in fenced blocks, inline code and comments of recipes, in order."""
    fenced = [match.span() for match in FENCE.finditer(text)]
    found = []
    for start, stop, pattern in _regions(len(text), fenced):
        for module, rest in pattern.findall(text[start:stop]):
            found.append((module, _arguments(rest)))
    return found


def _regions(end: int, fenced: list[tuple[int, int]]) -> Iterator[tuple[int, int, re.Pattern]]:
    at = 0
    for start, stop in fenced:
        yield at, start, COMMAND
        yield start, stop, COMMAND_IN_FENCE
        at = stop
    yield at, end, COMMAND


def _arguments(rest: str) -> tuple[str, ...]:
    """The words up to a pipe, a redirection, a comment or the end of a quotation around the command."""
    rest = re.sub(r"'\s*$", "", rest) if rest.count("'") % 2 else rest
    lexer = shlex.shlex(rest.replace("\\\n", " "), posix=True, punctuation_chars="|><;&")
    lexer.whitespace_split = True
    words = []
    for word in lexer:
        if set(word) <= set("|><;&"):
            break
        words.append(word)
    return tuple(words)


EVERYWHERE = [
    pytest.param(module, arguments, id=f"{page.name}:{module} {' '.join(arguments)}"[:90])
    for page in [*PAGES, *RECIPES]
    for module, arguments in dict.fromkeys(commands(page.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize(("module", "arguments"), EVERYWHERE)
def test_command_is_accepted(module, arguments):
    main = importlib.import_module(module).main
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(["--help"])
    flags = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", out.getvalue())) | {"--help"}
    for word in arguments:
        assert not word.startswith("-") or word in flags, f"{module} has no flag {word}"
    if module in SCHEMAS:
        _check_recipe(module, arguments)


STACK = (
    "{vocab_size: 9, d_model: 8, n_layers: 1, n_heads: 1, d_ff: 8, max_seq_len: 8, norm: {kind: layer}, "
    "norm_placement: post, embed_norm: true, positions: {kind: learned}}"
)


def _check_recipe(module: str, arguments: tuple[str, ...]) -> None:
    """Every key=value is a key; with a recipe of ours, the two together are valid."""
    overrides = [word.replace("gs://", "") for word in arguments if OVERRIDE.fullmatch(word)]  # nobody asks a bucket
    known = {*keys(SCHEMAS[module]), "model.preset"}
    for override in overrides:
        key = re.sub(r"\.\d+(?=\.|$)", ".0", override.partition("=")[0])
        assert key in known, f"{override}: {module} has no key {key}"
    recipe = next((ROOT / word for word in arguments if word.endswith(".yaml")), None)
    if recipe is None:
        return
    if module == "jaxllm.prepare":
        configs.load(PrepareConfig, recipe, overrides)
    else:  # a preset, or an encoder for a head, because the run that it starts from is not here
        here = configs.read(recipe).get("model", {})
        known = {"head": ["start_from=none", f"model.stack={STACK}"], "both": [], "stack": []}
        made = next((known[key] for key in ("stack", "both", "head") if key in here), ["model.preset=tiny"])
        load_recipe(recipe, [*made, *overrides])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_links_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [link for link in links if not (page.parent / link.partition("#")[0]).exists()]
    missing += [path for path in OUR_FILE.findall(text) if not (ROOT / path).exists() and path not in links]
    assert not missing


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        used = set(re.findall(r"(?:`|^ +)make ([a-z]+)\b", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert used <= targets, page


def python_blocks() -> list:
    found = []
    for page in PAGES:
        blocks = [match["body"] for match in FENCE.finditer(page.read_text("utf-8")) if match["language"] == "python"]
        found += [pytest.param(block, id=f"{page.name}-{number}") for number, block in enumerate(blocks)]
    return found


@pytest.mark.parametrize("block", python_blocks())
def test_python_block_compiles_and_its_names_exist(block):
    tree = ast.parse(block)
    compile(tree, "block", "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("jaxllm."):
            name = ast.unparse(node).split(".")[1]
            assert hasattr(importlib.import_module("jaxllm"), name), f"jaxllm.{name}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lm":
            assert node.attr in {*dir(importlib.import_module("jaxllm").LanguageModel), "config", "params", "tokenizer"}


def test_conversations_in_the_documents_are_read(tmp_path):
    for page in PAGES:
        rows = [m["body"] for m in FENCE.finditer(page.read_text("utf-8")) if m["language"] == "json"]
        for number, body in enumerate(rows):
            path = tmp_path / f"{page.name}-{number}.jsonl"
            path.write_text(body, encoding="utf-8")
            found = list(sources.conversations(sources.RowFiles(path=str(path)), Problems("error")))
            instances = sum(len(json.loads(line).get("instances", [0])) for line in body.splitlines())
            assert len(found) == instances


def test_a_file_that_a_command_reads_is_written_before():
    for page in PAGES:
        for match in FENCE.finditer(page.read_text("utf-8")):
            for name in re.findall(r"--prompts (\S+)", match["body"]):
                assert f"> {name}" in match["body"].partition("--prompts")[0], f"{page.name}: who writes {name}?"


def test_both_handbooks_have_the_same_commands():
    english, chinese = (commands((ROOT / "docs" / f"handbook.{each}.md").read_text("utf-8")) for each in ("en", "zh"))
    assert english == chinese
    assert len(english) > 20


def test_commands_are_found_wherever_they_stand():
    text = (
        "Run `python -m jaxllm.a x` and python -m jaxllm.b\n"
        "```sh\necho 'p q' | python -m jaxllm.c --k 'a b' \\\n  n=1 > out  # why\npython -m jaxllm.d 'a `b`'\n```\n"
        "    ssh h --command='cd d && python -m jaxllm.e f'\n"
    )
    expected = [
        ("jaxllm.a", "x"),
        ("jaxllm.b",),
        ("jaxllm.c", "--k", "a b", "n=1"),
        ("jaxllm.d", "a `b`"),
        ("jaxllm.e", "f"),
    ]
    assert [(module, *arguments) for module, arguments in commands(text)] == expected


def test_marked_blocks_run(tmp_path):
    """Blocks below `<!-- run -->` in the documents, as one script in a directory that has only configs/."""
    blocks = [m["body"] for page in PAGES for m in FENCE.finditer(page.read_text("utf-8")) if m["mark"]]
    assert blocks
    (tmp_path / "configs").symlink_to(ROOT / "configs", target_is_directory=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("JAX_NUM_CPU_DEVICES", None)  # each command chooses for itself, as it does for a user
    script = "set -euo pipefail\n" + "\n".join(blocks)
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/first/pretrain/checkpoints/10").is_dir()
