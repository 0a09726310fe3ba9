"""`jaxllm VERB ...`, the same as `python -m jaxllm.VERB ...`.

A verb is a module of this package with a function `main`; its description is the first line of its docstring. Both are
read from the source, so that listing them imports none of them.
"""

import ast
import difflib
import importlib
import importlib.util
import pkgutil
import sys

import jaxllm


def verbs() -> dict[str, str]:
    """Return the commands with their one-line descriptions, in alphabetical order."""
    found = {}
    for module in sorted(pkgutil.iter_modules(jaxllm.__path__)):
        if module.ispkg or module.name.startswith("_"):
            continue
        spec = importlib.util.find_spec(f"jaxllm.{module.name}")
        tree = ast.parse(spec.loader.get_source(spec.name))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[module.name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main(argv: list[str] | None = None) -> int | None:
    """Run one command, or list them all."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--version"]:
        print(f"jaxllm {jaxllm.__version__}")
        return 0
    known = verbs()
    if not argv or argv[0] in ("-h", "--help", "help"):
        lines = [f"  {verb:<12}{text}" for verb, text in known.items()]
        print("usage: jaxllm VERB ...\n\n" + "\n".join(lines) + "\n\njaxllm VERB --help says more.")
        return 0
    if argv[0] not in known:
        near = difflib.get_close_matches(argv[0], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        sys.stderr.write(f"error: unknown command {argv[0]!r}; {hint}\n")
        return 2
    return importlib.import_module(f"jaxllm.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
