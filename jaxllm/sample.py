"""python -m jaxllm.sample: text from a model, for one prompt, many, or a conversation."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from jaxllm.core.config import command

if TYPE_CHECKING:
    from jaxllm.inference.sampling import Sampler
    from jaxllm.language_model import LanguageModel

CHAT_HELP = "/reset starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
NOTES = """
Without --prompt, --prompts or --chat, the prompts are read from standard input, one per line.

A model that was tuned on conversations gets each prompt as a user's message in its chat template; --raw continues the
prompt as plain text instead. A model that was only pretrained always continues.

examples:
  python -m jaxllm.sample runs/quickstart --prompt 'Where is the ball?' --temperature 0
  python -m jaxllm.sample runs/quickstart --chat
  python -m jaxllm.sample runs/quickstart --prompts questions.txt --num-samples 4 --json > answers.jsonl
  echo 'Once upon a time' | python -m jaxllm.sample runs/pretrain --stream
"""


@command
def main(argv: list[str] | None = None) -> int | None:
    """Parse, load, answer."""
    arguments = parser().parse_args(argv)
    prompts = [] if arguments.chat else read_prompts(arguments)
    if arguments.stream and (len(prompts) > 1 or arguments.num_samples > 1 or arguments.json):
        raise ValueError("--stream shows one answer as text; leave out --json and --num-samples, and give one prompt")
    from jaxllm.locate import locate

    locate(arguments.model)  # a wrong path is an error now, not after JAX has started
    from jaxllm.inference.sampling import Sampler
    from jaxllm.language_model import load
    from jaxllm.sharding import distributed

    fields = {name: value for name, value in vars(arguments).items() if name in Sampler.model_fields}
    sampler = Sampler(**fields)
    distributed.start(distributed.PlatformConfig())
    lm = load(arguments.model)
    if arguments.chat:
        converse(lm, arguments, sampler)
    elif arguments.stream:
        for piece in lm.stream(_request(lm, prompts[0], arguments), **_options(arguments, sampler)):
            _say(piece)
        _say("\n")
    else:
        answer(lm, prompts, arguments, sampler)
    return None


def parser() -> argparse.ArgumentParser:
    """Return the command line of `sample`."""
    result = argparse.ArgumentParser(
        prog="python -m jaxllm.sample", description=__doc__.partition(": ")[2], epilog=NOTES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    result.add_argument("model", metavar="MODEL", help="run directory, or RUN/checkpoints/STEP")
    add = result.add_argument_group("prompts").add_argument
    add("--prompt", metavar="TEXT", help="the prompt")
    add("--prompts", metavar="FILE", type=Path, help='one per line; *.jsonl: {"prompt": ...} per line')
    add("--chat", action="store_true", help="talk to the model; " + CHAT_HELP)
    add("--system", metavar="TEXT", help="system message before every conversation")
    add("--raw", action="store_true", help="continue the prompt as plain text, without chat template")
    add = result.add_argument_group("choice of tokens").add_argument
    add("--temperature", type=float, default=0.8, help="0 = greedy (default %(default)s)")
    add("--top-k", type=int, metavar="K", help="keep the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="keep the most likely tokens that sum to probability P")
    add("--min-p", type=float, metavar="P", help="drop tokens below P times the best probability")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="> 1 disfavours what was said already")
    add("--seed", type=int, default=0, help="same seed, same answer (default %(default)s)")
    add("--num-samples", type=int, default=1, metavar="N", help="answers per prompt")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default %(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end an answer here; may be repeated")
    add = result.add_argument_group("output").add_argument
    add("--stream", action="store_true", help="write the text as it is made")
    add("--json", action="store_true", help="one JSON object per answer and line")
    return result


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """Return the prompts that the command line asks for, none of them empty.

    Raises:
      ValueError: two sources of prompts, none, or an empty one.
    """
    if arguments.prompt is not None and arguments.prompts is not None:
        raise ValueError("--prompt and --prompts are both given; choose one")
    if arguments.prompt is not None:
        prompts, source = [arguments.prompt], "--prompt"
    elif arguments.prompts is not None:
        prompts, source = _read_file(arguments.prompts), str(arguments.prompts)
    elif sys.stdin.isatty():
        raise ValueError("no prompt; give --prompt TEXT, --prompts FILE, --chat, or pipe prompts into standard input")
    else:
        prompts, source = _lines_of(sys.stdin.read()), "standard input"
    if not prompts:
        raise ValueError(f"{source} holds no prompt; write one per line")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            place = f" (number {number})" if len(prompts) > 1 else ""
            raise ValueError(f"the prompt of {source}{place} is empty; write something to answer or continue")
    return prompts


def _lines_of(text: str) -> list[str]:
    """Cut at newlines alone: a prompt may hold U+2028. Blank lines are skipped."""
    return [line for line in text.split("\n") if line.strip()]


def _read_file(path: Path) -> list[str]:
    """Read one prompt per line."""
    lines = _lines_of(path.read_text(encoding="utf-8"))
    if path.suffix != ".jsonl":
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(json.loads(line)["prompt"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path}, line {number}: expected {{"prompt": "..."}}, found {line[:60]!r}') from error
    return prompts


def answer(lm: "LanguageModel", prompts: list[str], arguments: argparse.Namespace, sampler: "Sampler") -> None:
    """Answer all prompts in batches and write them out in order."""
    requests = [_request(lm, prompt, arguments) for prompt in prompts]
    answers = lm.generate(requests, num_samples=arguments.num_samples, **_options(arguments, sampler))
    for found in answers:
        prompt = prompts[found.prompt]
        if arguments.json:
            line = {
                "prompt": prompt, "text": found.text, "tokens": len(found.tokens), "finish_reason": found.finish_reason,
                "sample": found.sample,
            }  # fmt: skip
            _say(json.dumps(line, ensure_ascii=False) + "\n")
        elif len(answers) > 1:
            _say(f"{'' if found is answers[0] else chr(10)}> {prompt}\n{found.text}\n")
        else:
            _say(found.text + "\n")


def converse(
    lm: "LanguageModel", arguments: argparse.Namespace, sampler: "Sampler", source: TextIO | None = None
) -> None:
    """Hold a conversation with whoever types into `source` (default: standard input)."""
    if lm.tokenizer.chat is None:
        raise ValueError(f"{arguments.model} has no chat template; continue texts with --prompt instead")
    start = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages = list(start)
    _say(CHAT_HELP + "\n")
    for line in _lines(source or sys.stdin):
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(start)
            _say("(the conversation starts over)\n")
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        pieces: list[str] = []
        try:
            for piece in lm.stream(messages, **_options(arguments, sampler)):
                pieces.append(piece)
                _say(piece)
        except KeyboardInterrupt:
            _say(" (stopped)")
        except ValueError as error:  # the conversation has outgrown the model
            messages.pop()
            _say(f"({error}; /reset starts over)\n")
            continue
        _say("\n")
        messages.append({"role": "assistant", "content": "".join(pieces)})


def _lines(source: TextIO) -> Iterator[str]:
    """Yield what is typed, without spaces around; Ctrl-D and Ctrl-C at the prompt end it."""
    while True:
        _say("> ")
        try:
            line = source.readline()
        except KeyboardInterrupt:
            line = ""
        if not line:
            _say("\n")
            return
        yield line.strip()


def _request(lm: "LanguageModel", prompt: str, arguments: argparse.Namespace) -> "str | list[dict[str, str]]":
    """Return `prompt` as messages if the model was taught to answer, else as it is."""
    if arguments.raw or not lm.is_chat:
        if arguments.system:
            raise ValueError("--system needs a chat template; leave out --raw, or choose a tuned model")
        return prompt
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    return [*system, {"role": "user", "content": prompt}]


def _options(arguments: argparse.Namespace, sampler: "Sampler") -> dict:
    return {"max_new_tokens": arguments.max_new_tokens, "sampler": sampler, "stop": arguments.stop}


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
