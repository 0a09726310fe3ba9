"""python -m jaxllm.prepare: text to a dataset that `train` and `tune` read.

examples:
  python -m jaxllm.prepare --text 'books/**/*.txt' --split paragraph --vocab-size 16000 --out data/books
  python -m jaxllm.prepare --jsonl news.jsonl:body --jsonl forum.jsonl:post --tokenizer data/books --out data/web
  python -m jaxllm.prepare --chat --jsonl alpaca.jsonl --jsonl math.jsonl:question,answer --tokenizer data/books --out d
  python -m jaxllm.prepare --text 'books/**/*.txt' --split paragraph --compare bpe:8000,bpe:16000,unigram:8000,bytes
  python -m jaxllm.prepare --warc 'crawl/*.warc.gz' --parquet wiki:text --tfds lm1b:1.1.0:text --out data/mix
  python -m jaxllm.prepare RECIPE.yaml clean.min_chars=200 seed=1
"""

import argparse
import re
import sys

from jaxllm.core.command import command, parser

FIELDS = "FIELDS: the text's field, or for chat messages, alpaca, instances or PROMPT,ANSWER"
SOURCES = {  # flag: what it takes, and what it is; each may be given again
    "text": ("PATH", "text files: a file, 'glob/**', directory, .zip or .tar, also .gz, .zst, gs://...; repeatable"),
    "markdown": ("PATH", "Markdown files, without the YAML at their beginning"),
    "html": ("PATH", "web pages; their main content"),
    "warc": ("PATH", "web archives, WARC or WET"),
    "jsonl": ("PATH[:FIELDS]", f"JSON lines; {FIELDS}"),
    "parquet": ("PATH[:FIELDS]", "Parquet files"),
    "arrayrecord": ("PATH[:FIELDS]", "ArrayRecord files; records are text, or with FIELDS, JSON"),
    "hf": ("DIR[:FIELDS]", "a directory of save_to_disk of Hugging Face datasets"),
    "tfds": ("NAME[:VERSION][:FIELDS]", "a prepared TFDS data set; inputs.0.data_dir=DIR, inputs.0.split=SPLIT"),
}
OPTIONS = {"split": ("text", "markdown"), "encoding": ("text", "markdown", "jsonl")}  # flags, and of which sources
NAME_AND_FIELDS = r"((?:\w+://|[A-Za-z]:\\)?[^:]*(?::\d+\.\d+\.\d+)?)(?::(.*))?"  # also gs://..., name:1.0.0


@command
def main(argv: list[str] | None = None) -> int | None:
    """Prepare a dataset, print the account of it."""
    from jaxllm.core import config as configs
    from jaxllm.core import schema
    from jaxllm.data import prepare, report
    from jaxllm.data.tokenizers.pieces_training import TokenizerConfig

    arguments, rest = _parser().parse_known_args(argv)
    if arguments.help:
        sys.stdout.write(_parser().format_help() + "\nkeys of RECIPE and of key=value:\n")
        sys.stdout.write(schema.describe(prepare.PrepareConfig))
        return 0
    inputs = _inputs(arguments)
    recipe, overrides = _positional(rest, bool(inputs))
    commands = {"start_from": "tune", "data": "train"}
    ways = {"inputs": "--text FILE, --jsonl FILE or another input (--help has all)", "out": "--out DIR"}
    given = inputs + _settings(arguments) + overrides
    config = configs.load(prepare.PrepareConfig, recipe, given, commands=commands, ways=ways)

    from rich.console import Console

    console = Console()
    if arguments.compare:
        from jaxllm.data import compare

        specs, size = arguments.compare.split(","), TokenizerConfig().sample_bytes
        compare.show(compare.compare(specs, compare.read(config), size), console)
        return None
    report.show(prepare.prepare(config, console), console)
    return None


def _parser() -> argparse.ArgumentParser:
    """The flags; what is no source and not the tokenizer is stored under its key in a recipe."""
    result = parser(__doc__, usage="%(prog)s [RECIPE] [flags] [key=value ...]", add_help=False)
    add = result.add_argument
    switch = {"action": "store_const", "const": True}
    add("-h", "--help", **switch, help="show this text")
    for kind, (metavar, text) in SOURCES.items():
        add(f"--{kind}", metavar=metavar, action="append", default=[], help=text)
    add("--split", choices=("file", "paragraph", "line"), help="what one document of --text, --markdown is")
    add("--encoding", metavar="E,E", help="of --text, --markdown, --jsonl: gb18030; of several, the first that fits")
    add("--pydocs", **switch, help="documentation of the Python standard library")
    add("--world", metavar="N", type=int, help="N documents or conversations of the synthetic micro-world")
    add("--chat", **switch, help="conversations: learn the assistant's answers only")
    tokenizer = "bpe or unigram (train one), bytes, or the path of a tokenizer, dataset, run or .model file"
    add("--tokenizer", metavar="T", help=tokenizer)
    add("--vocab-size", dest="tokenizer.vocab_size", metavar="N", type=int, help="ids of a trained tokenizer")
    compared = "make no dataset, but a table of these: bpe:8000,unigram:8000,bytes,PATH (trained on nine tenths)"
    add("--compare", metavar="T,T", help=compared)
    add("--out", metavar="DIR", help="dataset directory to make")
    held_out = "documents to hold out: a share if below 1, else a number (default: 0.01)"
    add("--validation", metavar="X", type=float, help=held_out)
    add("--errors", choices=("error", "skip", "replace"), help="what to do with unreadable input (default: error)")
    row_length = "row length for which the report gives rows and padding (default: 512)"
    add("--seq-len", metavar="T", type=int, help=row_length)
    add("--seed", metavar="N", type=int, help="decides which documents are held out, and what --world says")
    workers = "processes that do the work (default: one for each core); the data are the same"
    add("--workers", dest="engine.workers", metavar="N", type=int, help=workers)
    add("--runner", dest="engine.kind", choices=("local", "beam"), help="processes of this machine, or Apache Beam")
    add("--overwrite", **switch, help="replace the dataset if it exists")
    return result


def _positional(rest: list[str], has_inputs: bool) -> tuple[str | None, list[str]]:
    """Split what is no flag into the recipe and the overrides; `has_inputs`: sources were given as flags."""
    overrides = [text for text in rest if re.match(r"[A-Za-z_][\w.]*=", text)]
    others = [text for text in rest if text not in overrides]
    if wrong := [text for text in others if text.startswith("-")]:
        _parser().error(f"unrecognized arguments: {wrong[0]}")
    shown = ", ".join(others[:2]) + (f" and {len(others) - 2} more" if len(others) > 2 else "")
    if len(others) > 1 or (others and has_inputs and not others[0].endswith((".yaml", ".yml"))):
        raise ValueError(
            f"one RECIPE.yaml is expected, or flags alone, but not {shown}; quote the pattern, so that the shell does "
            "not expand it (--text 'books/*.txt'), and repeat the flag for each pattern"
        )
    if others and has_inputs:
        raise ValueError(f"sources are given twice: in {shown} and as flags; write all into the recipe, or use flags")
    return (others[0] if others else None), overrides


def _inputs(arguments: argparse.Namespace) -> list[str]:
    """The sources given as flags, in the notation of overrides."""
    inputs = []
    for kind, (form, _) in SOURCES.items():
        for given in getattr(arguments, kind):
            parts = re.fullmatch(NAME_AND_FIELDS, given) if "FIELDS" in form else None
            name, fields = parts.groups() if parts else (given, None)
            more = {option: getattr(arguments, option) for option, kinds in OPTIONS.items() if kind in kinds}
            key = "name" if kind == "tfds" else "path"
            inputs.append({"kind": kind, key: name, "fields": fields or None, **more})
    for option, kinds in OPTIONS.items():
        if getattr(arguments, option) and not any(each["kind"] in kinds for each in inputs):
            raise ValueError(f"--{option} is for --{', --'.join(kinds)}, and there is none of them")
    if arguments.pydocs:
        inputs.append({"kind": "pydocs"})
    if arguments.world is not None:
        inputs.append({"kind": "world", "count": arguments.world, "seed": arguments.seed})
    return [
        f"inputs.{i}.{key}={value}" for i, each in enumerate(inputs) for key, value in each.items() if value is not None
    ]


def _settings(arguments: argparse.Namespace) -> list[str]:
    """All other flags, in the notation of overrides."""
    own = ("help", "compare", *SOURCES, *OPTIONS, "pydocs", "world", "tokenizer")
    settings = {key: value for key, value in vars(arguments).items() if key not in own}
    settings["out"] = arguments.out or ("nowhere" if arguments.compare else None)  # a comparison writes nothing
    match arguments.tokenizer:
        case "bpe" | "unigram" as algorithm:
            settings |= {"tokenizer.kind": "train", "tokenizer.algorithm": algorithm}
        case "bytes":
            settings["tokenizer.kind"] = "bytes"
        case str() as path:
            settings |= {"tokenizer.kind": "existing", "tokenizer.path": path}
    return [f"{key}={value}" for key, value in settings.items() if value is not None]


if __name__ == "__main__":
    sys.exit(main())
