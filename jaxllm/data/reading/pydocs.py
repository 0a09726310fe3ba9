"""Real English that every Python has: the documentation topics and the docstrings of the standard library.

Read from the .py files, so it works under `python -OO` too. The text differs between Python versions; nothing is copied
or fetched.
"""

import ast
import inspect
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

from jaxllm.data.documents import Conversation, Document

SOURCE = "pydocs"
# Tests and vendored copies: not documentation.
EXCLUDED_PARTS = frozenset({
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_vendor", "_bundled", "lib-dynload",
})  # fmt: skip
QUESTIONS = (
    "What does `{name}` do?",
    "In Python, what is `{name}` for?",
    "Explain `{name}` in one sentence.",
    "Describe the Python {noun} `{name}`.",
)
_NOUNS = {ast.ClassDef: "class", ast.Module: "module"}


def documents(root: Path | None = None) -> Iterator[Document]:
    """Yield every documentation topic, then every docstring below its name and signature.

    Args:
      root: directory of .py files; None: the standard library.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship Python without it; the docstrings remain
        topics = {}
    for name in sorted(topics):
        yield Document(topics[name].strip("\n"), SOURCE, f"topic {name}")
    for name, node, docstring in _docstrings(root):
        signature = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ""
        yield Document(f"{name}{signature}\n\n{docstring}", SOURCE, name)


def conversations(root: Path | None = None) -> Iterator[Conversation]:
    """Yield one question per public name whose docstring starts with a one-sentence paragraph.

    The name decides the phrasing, so a second pass sees the same.
    """
    for name, node, docstring in _docstrings(root):
        answer = _one_sentence(docstring)
        if answer is None or any(part.startswith("_") for part in name.split(".")):
            continue
        question = QUESTIONS[zlib.crc32(name.encode("utf-8")) % len(QUESTIONS)]
        noun = _NOUNS.get(type(node), "function")
        yield Conversation.pair(question.format(name=name, noun=noun), answer, SOURCE, name)


def _docstrings(root: Path | None) -> Iterator[tuple[str, ast.AST, str]]:
    """(qualified name, node, docstring) in the order of files and lines."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if not EXCLUDED_PARTS.intersection(path.relative_to(root).parts))
    if not paths:
        raise ValueError(f"this Python has no .py files under {root}, so no documentation to read; use other sources")
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates and deliberately broken files
        yield from _walk(module, tree)


def _walk(name: str, node: ast.AST) -> Iterator[tuple[str, ast.AST, str]]:
    docstring = ast.get_docstring(node, clean=False)
    if docstring and docstring.strip():
        yield name, node, inspect.cleandoc(docstring)
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _walk(f"{name}.{child.name}", child)


def _one_sentence(docstring: str) -> str | None:
    """The first paragraph, if it is one sentence of a length worth learning."""
    text = " ".join(docstring.split("\n\n")[0].split())
    sentence = text.endswith(".") and ". " not in text and text[:1].isupper()
    return text if sentence and 20 <= len(text) <= 200 else None
