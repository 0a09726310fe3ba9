#!/usr/bin/env python3
"""Check the house limits: sizes, forbidden habits, and who may import whom.

    python tools/check_style.py [ROOT]

Prints `file:line: rule: message` for each violation and exits with status 1 if there is one; warnings do not count.
Reads sources only (standard library, nothing is imported), so it runs before anything is installed.
"""

import ast
import io
import json
import re
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MAX_FILE, WARN_FILE, MAX_FUNCTION, MAX_PARAMETERS, MAX_NESTING, MAX_LIBRARY = 400, 300, 60, 8, 4, 25_289
# The design's ceiling for the library is 12,000 lines. Above it this limit is what there is, so that it can only fall.

# Who may import whom inside jaxllm. "layers.cache" allows that module alone. Commands and other modules at the top may
# import everything but commands.
ALLOWED = {
    "core": (),
    "data": ("core",),
    "sharding": ("core",),
    "layers": ("core", "sharding"),
    "models": ("core", "sharding", "layers"),
    "hf": ("core", "layers.config", "models"),
    "training": ("core", "sharding", "models"),
    "inference": ("core", "sharding", "layers.cache", "models"),
    "tuning": ("core", "data", "models", "training", "inference"),
    "evaluation": ("core", "data", "models", "inference", "training.losses"),
    "planning": ("core", "sharding", "models", "training", "inference"),
}
NOWHERE = {"torch", "transformers", "tensorflow", "keras", "torchvision"}
HEAVY = {
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax",
    "grain",
    "chex",
}  # slow to import, and would start a backend in workers
JAX_TYPES = {"Array", "ArrayLike", "PRNGKeyArray", "Scalar"}  # of jaxtyping: asking for one imports jax
NEVER = {  # per package, wherever in the file
    "layers": {"optax", "orbax", "grain", "sentencepiece"},
    "models": {"optax", "orbax", "grain", "sentencepiece"},
    "training": {"sentencepiece", "jinja2"},
    "inference": {"optax", "orbax", "grain", "sentencepiece", "jinja2"},
}
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match, ast.AsyncFor, ast.AsyncWith, ast.TryStar)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Problem(NamedTuple):
    """One violation, or a warning."""

    path: Path
    line: int
    rule: str
    text: str
    warning: bool = False


class Import(NamedTuple):
    """One imported module.

    Attributes:
      name: dotted, resolved to a module of the project where there is one.
      top: runs when the file is imported (not in a function, not under TYPE_CHECKING).
    """

    name: str
    line: int
    top: bool


class Source:
    """A parsed file."""

    def __init__(self, root: Path, path: Path):
        self.path = path.relative_to(root)
        self.text = path.read_text(encoding="utf-8")
        self.lines = self.text.splitlines()
        self.tree = ast.parse(self.text, str(path))
        parts = self.path.with_suffix("").parts
        self.module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def is_command(self) -> bool:
        """Whether this is jaxllm/VERB.py: at the top of the package, with a function `main`."""
        return self.module.startswith("jaxllm.") and self.module.count(".") == 1 and any(
            isinstance(node, FUNCTIONS) and node.name == "main" for node in self.tree.body
        )  # fmt: skip

    def problem(self, line: int, rule: str, text: str, warning: bool = False) -> Problem:
        """Return a problem of this file."""
        return Problem(self.path, line, rule, text, warning)


def check(root: Path) -> list[Problem]:
    """Return all problems of the tree at `root`: jaxllm/, tools/ and tests/."""
    paths = [path for folder in ("jaxllm", "tools", "tests") for path in sorted((root / folder).rglob("*.py"))]
    sources = [Source(root, path) for path in paths]
    library = [source for source in sources if source.path.parts[0] == "jaxllm"]
    problems = [problem for source in sources for problem in (*sizes(source), *habits(source))]
    problems += [problem for source in library for problem in configs(source)]
    problems += [*imports(library), *class_depth(library)]
    total = sum(len(source.lines) for source in library)
    if total > MAX_LIBRARY:
        problems.append(Problem(Path("jaxllm"), 0, "library-length", f"{total} lines, limit {MAX_LIBRARY}"))
    if library:
        median = statistics.median(len(source.lines) for source in library)
        print(f"{len(library)} library files, {total} lines (limit {MAX_LIBRARY}), median {median:g}")
    return problems


def sizes(source: Source) -> Iterator[Problem]:
    """Files, functions, parameters, nesting."""
    length = len(source.lines)
    if length > WARN_FILE:
        limit = MAX_FILE if length > MAX_FILE else WARN_FILE
        yield source.problem(length, "file-length", f"{length} lines, limit {limit}", warning=length <= MAX_FILE)
    documentation = {line for node in ast.walk(source.tree) for line in _docstring(node)}
    for node in ast.walk(source.tree):
        if not isinstance(node, FUNCTIONS):
            continue
        span = set(range(node.lineno, node.end_lineno + 1)) - documentation
        code = [line for line in span if not re.match(r"\s*(#|$)", source.lines[line - 1])]
        if len(code) > MAX_FUNCTION:
            text = f"{node.name} has {len(code)} code lines, limit {MAX_FUNCTION}"
            yield source.problem(node.lineno, "function-length", text)
        arguments = node.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        if count > MAX_PARAMETERS:
            yield source.problem(node.lineno, "parameters", f"{node.name} has {count}, limit {MAX_PARAMETERS}")
        if (deep := _depth(node.body)) > MAX_NESTING:
            yield source.problem(node.lineno, "nesting", f"{node.name} nests {deep} deep, limit {MAX_NESTING}")


def _docstring(node: ast.AST) -> range:
    """Return the lines of the docstring of a module, class or function."""
    if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node, clean=False) is not None:
        return range(node.body[0].lineno, node.body[0].end_lineno + 1)
    return range(0)


def _depth(body: list[ast.stmt]) -> int:
    """Return how deep blocks nest; elif counts as its if, a nested function starts again."""
    deepest = 0
    for node in body:
        if not isinstance(node, BLOCKS):
            continue
        parts = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        parts += [part.body for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ()))]
        for part in parts:
            is_elif = (
                isinstance(node, ast.If) and part is node.orelse and len(part) == 1 and isinstance(part[0], ast.If)
            )
            deepest = max(deepest, _depth(part) + (0 if is_elif else 1))
    return deepest


def habits(source: Source) -> Iterator[Problem]:
    """Catch-all handlers, drawer modules, to-dos without an issue."""
    drawers = r"(.*_)?(utils?|helpers?|common|misc)"
    if re.fullmatch(drawers, source.path.stem) or any(re.fullmatch(drawers, part) for part in source.path.parts[:-1]):
        yield source.problem(1, "module-name", "name the module after what it holds")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            reasoned = "# catch-all: " in source.lines[node.lineno - 1]  # such as a library that raises nothing finer
            if not reasoned and any(kind is None or _last(kind) in ("Exception", "BaseException") for kind in kinds):
                yield source.problem(node.lineno, "catch-all", "name the errors that are expected")
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT and re.search(r"\b(TODO|FIXME|XXX|HACK)\b(?!.*#\d)", token.string):
            yield source.problem(token.start[0], "todo", "name the issue: TODO #123, or do it now")


def configs(source: Source) -> Iterator[Problem]:
    """No getattr or hasattr with a written-out name on a config: the schema says what is there."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and _last(node.func) in ("getattr", "hasattr", "setattr") and len(node.args) > 1:
            is_config = re.search(r"(config|cfg|recipe)s?$", _last(node.args[0]))
            if is_config and isinstance(node.args[1], ast.Constant):
                yield source.problem(
                    node.lineno, "config-access", f"write {ast.unparse(node.args[0])}.{node.args[1].value}"
                )


def undefined(root: Path) -> Iterator[Problem]:
    """Names that nothing defines, as ruff finds them (if it is here); an axis alone, Float[Array, "T"], is none."""
    command = f"{sys.executable} -m ruff check --isolated --no-cache --select F821 --output-format json".split()
    found = subprocess.run([*command, "jaxllm", "tools", "tests"], cwd=root, capture_output=True, text=True).stdout
    for hit in json.loads(found or "[]"):
        path, row = Path(hit["filename"]).relative_to(root.resolve()), hit["location"]["row"]
        line = (root / path).read_text(encoding="utf-8").splitlines()[row - 1]
        if line[hit["location"]["column"] - 2] != '"' or line[hit["end_location"]["column"] - 1 :][:1] != '"':
            yield Problem(path, row, "undefined", hit["message"])


def _last(node: ast.AST | None) -> str:
    """Return the last word of a name: c of a.b.c."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def class_depth(library: list[Source]) -> Iterator[Problem]:
    """At most one project class above a framework's class; Config counts as a framework's."""
    classes = [(source, node) for source in library for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)]
    bases = {node.name: [_last(base) for base in node.bases] for _, node in classes if node.name != "Config"}
    for source, node in classes:
        for parent in bases.get(node.name, ()):
            above = [base for base in bases.get(parent, ()) if base in bases]
            if above:
                text = f"{node.name} > {parent} > {above[0]}: compose, or flatten the middle class"
                yield source.problem(node.lineno, "class-depth", text)


def imports(library: list[Source]) -> Iterator[Problem]:
    """The import table, forbidden packages, and modules that must be cheap to import."""
    modules = {source.module for source in library}
    commands = {source.module for source in library if source.is_command}
    table = {source.module: list(_imports(source, modules)) for source in library}
    for source in library:
        own = source.module.split(".")[1] if source.module.count(".") else ""
        for name, line, top in table[source.module]:
            outside = name.split(".")[0]
            if outside in NOWHERE:
                yield source.problem(line, "import", f"{outside} is not a dependency of the library")
            elif outside in NEVER.get(own, ()):
                yield source.problem(line, "import", f"{own} never sees {outside}")
            elif top and outside in HEAVY and (own in ("core", "data") or source.is_command):
                yield source.problem(line, "import", f"{outside} only inside functions here: it is slow to import")
            elif name in commands and source.module != "jaxllm.__main__":
                yield source.problem(line, "import", f"{name} is a command; nobody imports a command")
            elif outside == "jaxllm" and not _may_import(own, name):
                allowed = ", ".join(ALLOWED[own]) or "nothing"
                yield source.problem(line, "import", f"{own} may import {allowed}; not {name.removeprefix('jaxllm.')}")
        chain = _heavy_chain(source.module, table) if source.is_command else []
        if len(chain) > 2:
            yield source.problem(
                1, "import", f"--help imports {' -> '.join(chain)}; import {chain[1]} inside functions"
            )


def _may_import(own: str, name: str) -> bool:
    """Whether a module of package `own` may import project module `name`."""
    if own not in ALLOWED:
        return True
    return any(f"{name}.".startswith(f"jaxllm.{package}.") for package in (own, *ALLOWED[own])) or name == "jaxllm"


def _imports(source: Source, modules: set[str]) -> Iterator[Import]:
    """Yield what a file imports; `from package import name` is package.name where that is a module."""
    package = source.module if source.path.stem == "__init__" else source.module.rpartition(".")[0]
    for node, top in _statements(source.tree, True):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                name = "jax" if base == "jaxtyping" and alias.name in JAX_TYPES else name if name in modules else base
                yield Import(name, node.lineno, top)


def _statements(node: ast.AST, top: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Walk a tree, with whether each node runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        lazy = isinstance(child, FUNCTIONS) or (isinstance(child, ast.If) and _last(child.test) == "TYPE_CHECKING")
        yield child, top
        yield from _statements(child, top and not lazy)


def _heavy_chain(module: str, table: dict[str, list[Import]], seen: frozenset[str] = frozenset()) -> list[str]:
    """Return the first chain of module-level imports from `module` to a heavy package; empty if there is none."""
    for name, _, top in table.get(module, ()):
        if top and name.split(".")[0] in HEAVY:
            return [module, name.split(".")[0]]
        if top and name in table and name not in seen:
            rest = _heavy_chain(name, table, seen | {module})
            if rest:
                return [module, *rest]
    return []


def main(argv: list[str] | None = None) -> int:
    """Print the problems; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    root = Path(argv[0]) if argv else Path(__file__).resolve().parent.parent
    problems = [*check(root), *undefined(root)]
    for problem in problems:
        label = "warning: " if problem.warning else ""
        print(f"{problem.path}:{problem.line}: {label}{problem.rule}: {problem.text}")
    return int(any(not problem.warning for problem in problems))


if __name__ == "__main__":
    sys.exit(main())
