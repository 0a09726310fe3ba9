"""`jaxllm VERB ...`, the same as `python -m jaxllm.VERB ...`.

A verb is a module of this package with a `@command`; its description is the first line of its docstring. Both are
read from the source, so that listing them imports none of them.
"""

import difflib
import importlib
import sys
from pathlib import Path

import jaxllm


def verbs() -> dict[str, str]:
    """Return the commands with their one-line descriptions, in alphabetical order."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))}
    does = {name: text.partition("\n")[0].strip('"').partition(": ")[2] for name, text in sources.items()}
    return {name: does[name] for name, text in sources.items() if "\n@command\ndef main(" in text}


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
