"""python -m jaxllm.sample: text from a model, for one prompt, many, or a conversation.

Without --prompt, --prompts or --chat, the prompts are read from standard input, one per line.

A model that was tuned on conversations gets each prompt as a user's message in its chat template; --raw continues the
prompt as plain text instead. A model that was only pretrained always continues. For an encoder-decoder (T5, BART,
Marian) a prompt is a text to translate or to sum up, in the way that the checkpoint's generation_config.json asks for.

examples:
  python -m jaxllm.sample runs/quickstart --prompt 'Where is the ball?' --temperature 0
  python -m jaxllm.sample runs/quickstart --chat
  python -m jaxllm.sample runs/quickstart --prompts questions.txt --num-samples 4 --json > answers.jsonl
  echo 'Once upon a time' | python -m jaxllm.sample runs/pretrain --stream
  python -m jaxllm.sample opus-mt-en-de --prompts english.txt --num-beams 4
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxllm.core import config as configs
from jaxllm.core.command import command, parser

if TYPE_CHECKING:
    from rich.status import Status

    from jaxllm.encoder_decoder import EncoderDecoder
    from jaxllm.inference.sampling import Sampler
    from jaxllm.language_model import LanguageModel

    Model = LanguageModel | EncoderDecoder

CHAT_HELP = "/reset starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer or drops a line"
COMPILES = "/jax/compilation_cache/compile_requests_use_cache"  # what JAX announces before it compiles


class Prompt(NamedTuple):
    """What is asked, where it was written ("--prompt", "questions.txt, line 3"), and what else its row of JSON has."""

    text: str
    place: str
    row: dict = {}  # noqa: RUF012  never written


@command
def main(argv: list[str] | None = None) -> int | None:
    """Parse, load, answer; what the user waits for is said on standard error, if that is a terminal."""
    arguments = _parser().parse_args(argv)
    if arguments.chat:
        _check_chat(arguments)
    prompts = [] if arguments.chat else read_prompts(arguments)
    if arguments.stream and (len(prompts) > 1 or arguments.num_samples > 1 or arguments.json):
        raise ValueError("--stream shows one answer as text; leave out --json and --num-samples, and give one prompt")
    if arguments.stream and _searches(arguments):
        raise ValueError("--stream shows tokens as they come, and --num-beams has an answer at its end; leave out one")
    with _status(f"loading {arguments.model} ..."):
        lm, sampler = _load(arguments)
    if arguments.chat:
        converse(lm, arguments, sampler)
    elif arguments.stream:
        text = ""
        for piece in _pieces(lm.stream(_requests(lm, prompts, arguments)[0], **_options(arguments, sampler))):
            text += piece
            _say(piece)
        _say("\n")
        _note_empty(text, prompts[0])
    else:
        answer(lm, prompts, arguments, sampler)
    return None


def _load(arguments: argparse.Namespace) -> "tuple[Model, Sampler]":
    from jaxllm.locate import look

    config, model = look(arguments.model, encoders=True)  # a wrong path is an error now, not after JAX has started
    from jaxllm.inference.decode import tensor_mesh
    from jaxllm.inference.sampling import Sampler
    from jaxllm.inference.search import Search
    from jaxllm.language_model import load
    from jaxllm.models.config import is_vae
    from jaxllm.models.encoder_config import EncoderConfig
    from jaxllm.models.seq2seq_config import Seq2SeqConfig
    from jaxllm.sharding import distributed

    if isinstance(config, EncoderConfig):
        raise ValueError(f"{arguments.model} is an encoder and writes no text; jaxllm.load it in Python")
    if is_vae(config):
        raise ValueError(f"{arguments.model} is a VAE: jaxllm.load it in Python, and sample or interpolate")
    if arguments.chat and isinstance(config, Seq2SeqConfig):
        raise ValueError(f"{arguments.model} turns one text into another and holds no conversation; leave out --chat")
    given = {name: vars(arguments)[name] for name in Sampler.model_fields if vars(arguments)[name] is not None}
    if not given.keys() & {"temperature", "top_k", "top_p", "min_p"}:
        given |= {"temperature": 0} if _searches(arguments) else {}
    else:
        given.setdefault("temperature", Sampler().temperature)
    sampler = configs.load(Sampler, None, [f"{name}={value}" for name, value in given.items()])
    configs.load(Search, None, [f"{name}={value}" for name, value in _search(arguments).items()])  # refuses, if at all
    distributed.start(distributed.PlatformConfig())
    lm = load(model, mesh=tensor_mesh(config), text=True)
    searches = _searches(arguments)
    if isinstance(config, Seq2SeqConfig):
        sampler = lm.sampler.model_copy(update={name: vars(sampler)[name] for name in given})
        lm.search = lm.search.model_copy(update=_search(arguments))
        searches = lm.search.num_beams > 1 and sampler.temperature == 0
    if arguments.length_penalty is not None and not searches:
        raise ValueError("--length-penalty counts in a search alone; add --num-beams, or leave it out")
    return lm, sampler


def _status(text: str) -> "Status":
    """Say on standard error, if it is a terminal, what takes so long."""
    from rich.console import Console
    from rich.markup import escape

    return Console(stderr=True).status(escape(text), refresh_per_second=4)


@contextmanager
def _answering() -> Iterator[None]:
    """Show that an answer is under way, and if it waits for the compiler, that too."""
    from jax import monitoring

    with _status("answering ...") as status:
        heard = lambda event, **_: status.update("answering (compiling) ...") if event == COMPILES else None
        monitoring.register_event_listener(heard)
        try:
            yield
        finally:
            monitoring.unregister_event_listener(heard)


def _pieces(stream: Iterator[str]) -> Iterator[str]:
    """Yield an answer's pieces; until the first one there is a status."""
    with _answering():
        first = next(stream, "")
    yield first
    yield from stream


def _parser() -> argparse.ArgumentParser:
    result = parser(__doc__)
    result.add_argument(
        "model", metavar="MODEL", help="run directory, such as runs/quickstart, or RUN/checkpoints/STEP"
    )
    add = result.add_argument_group("prompts").add_argument
    add("--prompt", metavar="TEXT", help="the prompt")
    add("--prompts", metavar="FILE", type=Path, help='one per line; *.jsonl: {"prompt": ...} per line, kept by --json')
    add("--chat", action="store_true", help="talk to the model; " + CHAT_HELP)
    add("--system", metavar="TEXT", help="system message before every conversation")
    add("--raw", action="store_true", help="continue the prompt as plain text, without chat template")
    add = result.add_argument_group("choice of tokens").add_argument
    add("--temperature", type=float, help="0 = greedy (default 0.8, for encoder-decoders the checkpoint's)")
    add("--top-k", type=int, metavar="K", help="keep the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="keep the most likely tokens that sum to probability P")
    add("--min-p", type=float, metavar="P", help="drop tokens below P times the best probability")
    add("--repetition-penalty", type=float, metavar="X", help="> 1 disfavours what was said already")
    add("--num-beams", type=int, metavar="N", help="search the likeliest of N (default: the checkpoint's, or 1)")
    add("--length-penalty", type=float, metavar="X", help="of the search: > 0 favours long answers, < 0 short ones")
    add("--seed", type=int, help="same seed, same answer (default 0)")
    add("--num-samples", type=int, default=1, metavar="N", help="answers per prompt; of a search the N best")
    add("--max-new-tokens", type=int, metavar="N", help="longest answer (default: the checkpoint's, or 256)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end an answer here; may be repeated")
    add = result.add_argument_group("output").add_argument
    add("--stream", action="store_true", help="write the text as it is made")
    add("--json", action="store_true", help="one JSON object per answer and line")
    return result


def _check_chat(arguments: argparse.Namespace) -> None:
    """Refuse flags that a conversation would ignore."""
    defaults = {"prompt": None, "prompts": None, "raw": False, "num_samples": 1, "stream": False, "json": False,
                "num_beams": None, "length_penalty": None}  # fmt: skip
    given = [name for name, default in defaults.items() if vars(arguments)[name] != default]
    if ignored := [f"--{name.replace('_', '-')}" for name in given]:
        raise ValueError(f"--chat is a conversation and would ignore {', '.join(ignored)}; leave out one or the other")


def read_prompts(arguments: argparse.Namespace) -> list[Prompt]:
    """Return the prompts that the command line asks for, none of them empty.

    Raises:
      ValueError: two sources of prompts, none, an empty one, or one that is not UTF-8.
    """
    if arguments.prompt is not None and arguments.prompts is not None:
        raise ValueError("--prompt and --prompts are both given; choose one")
    if arguments.prompt is not None:
        prompts, source = [Prompt(arguments.prompt, "--prompt")], "--prompt"
    elif arguments.prompts is not None:
        source = str(arguments.prompts)
        prompts = _lines_of(arguments.prompts.read_bytes(), source)
        if arguments.prompts.suffix == ".jsonl":
            prompts = [_json_prompt(line) for line in prompts]
    elif sys.stdin.isatty():
        raise ValueError("no prompt; give --prompt TEXT, --prompts FILE, --chat, or pipe prompts into standard input")
    else:
        source = "standard input"
        prompts = _lines_of(sys.stdin.buffer.read(), source)
    if not prompts:
        raise ValueError(f"{source} holds no prompt; write one per line")
    if source != "--prompt" and not prompts[0].row and _is_json(prompts[0].text):
        sys.stderr.write(
            f"note: {source} looks like JSON, and each of its lines is taken as it is for a prompt; "
            'for rows of {"prompt": "..."}, one per line, give --prompts a file named *.jsonl\n'
        )
    for text, place, _ in prompts:
        if not text.strip():
            raise ValueError(f"the prompt of {place} is empty; write something to answer or continue")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"the prompt of {place} has bytes that are not UTF-8, or half a surrogate pair; repair it")
    return prompts


def _lines_of(data: bytes, source: str) -> list[Prompt]:
    """Cut at newlines alone: a prompt may hold U+2028. Blank lines are skipped."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source} is not UTF-8 at byte offset {error.start} (byte 0x{data[error.start]:02x}); save it as UTF-8"
        ) from error
    lines = enumerate(text.removeprefix("\ufeff").split("\n"), 1)
    return [Prompt(line.removesuffix("\r"), f"{source}, line {number}") for number, line in lines if line.strip()]


def _is_json(line: str) -> bool:
    """Whether a file that begins with `line` is of JSON, on one line or several."""
    with contextlib.suppress(json.JSONDecodeError):
        return isinstance(json.loads(line), dict | list)
    return line.strip() in ("{", "[", "[{")


def _json_prompt(line: Prompt) -> Prompt:
    with contextlib.suppress(json.JSONDecodeError):
        match json.loads(line.text):
            case {"prompt": str(text), **rest}:
                return Prompt(text, line.place, {"prompt": text, **rest})
    raise ValueError(f'{line.place}: expected {{"prompt": "..."}}, found {line.text[:60]!r}')


def answer(lm: "Model", prompts: list[Prompt], arguments: argparse.Namespace, sampler: "Sampler") -> None:
    """Answer all prompts in batches and write them out in order."""
    requests = _requests(lm, prompts, arguments)
    with _answering():
        options = _options(arguments, sampler) | _search(arguments)
        answers = lm.generate(requests, num_samples=arguments.num_samples, **options)
    for found in answers:
        prompt = prompts[found.prompt].text
        if not arguments.json:
            _note_empty(found.text, prompts[found.prompt])
        if arguments.json:
            line = prompts[found.prompt].row | {
                "prompt": prompt, "text": found.text, "tokens": len(found.tokens), "finish_reason": found.finish_reason,
                "sample": found.sample,
            }  # fmt: skip
            _say(json.dumps(line, ensure_ascii=False) + "\n")
        elif len(answers) > 1:
            _say(f"{'' if found is answers[0] else chr(10)}> {prompt}\n{found.text}\n")
        else:
            _say(found.text + "\n")


def converse(lm: "Model", arguments: argparse.Namespace, sampler: "Sampler") -> None:
    """Hold a conversation with whoever types into standard input."""
    if lm.tokenizer.chat is None:
        raise ValueError(f"{arguments.model} has no chat template; continue texts with --prompt instead")
    from jaxllm.data.world.tasks import GUIDE
    from jaxllm.recipe import knows_world

    messages = _start(arguments)
    _say(CHAT_HELP + "\n")
    if not lm.is_chat:
        _say("note: this model was never tuned on conversations; it continues text, and its answers mean little\n")
    elif knows_world(arguments.model):
        _say(f"note: {GUIDE}\n")
    for line in _lines():
        if line == "/exit":
            return
        if line == "/reset":
            messages = _start(arguments)
            _say("(the conversation starts over)\n")
            continue
        if line.startswith("/"):
            _say(f"({line} is no command; {CHAT_HELP})\n")
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        if (length := len(lm.encode(messages))) >= lm.config.max_seq_len:
            messages.pop()
            what = "the conversation is full" if len(messages) > len(_start(arguments)) else "this is too long"
            _say(f"({what}: the model reads {lm.config.max_seq_len - 1} tokens, and with this they are {length}; "
                 "/reset begins a new conversation)\n")  # fmt: skip
            continue
        pieces: list[str] = []
        try:
            for piece in _pieces(lm.stream(messages, **_options(arguments, sampler))):
                pieces.append(piece)
                _say(piece)
            if not "".join(pieces).strip():
                _say("(empty answer)")
        except KeyboardInterrupt:
            _say(" (stopped)")
        _say("\n")
        messages.append({"role": "assistant", "content": "".join(pieces)})


def _lines() -> Iterator[str]:
    """Yield what is typed, without spaces around; Ctrl-D ends it, Ctrl-C drops a line. A terminal edits and recalls."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Windows
            import readline  # noqa: F401  `input` uses it
    while True:
        try:
            line = input("> ")
        except KeyboardInterrupt:
            _say("\n")
            continue
        except EOFError:
            _say("\n")
            return
        yield line.strip()


def _requests(lm: "Model", prompts: list[Prompt], arguments: argparse.Namespace) -> "list[str | list[dict[str, str]]]":
    """Return prompts as messages if the model was taught to answer, else as they are; name one that does not fit."""
    from jaxllm.models.seq2seq_config import Seq2SeqConfig

    plain = arguments.raw or not lm.is_chat
    if plain and arguments.system:
        why = "--raw takes no" if arguments.raw else f"{arguments.model} was never tuned on conversations and knows no"
        raise ValueError(f"{why} system message; leave out --system{' or --raw' * (arguments.raw and lm.is_chat)}")
    both = isinstance(lm.config, Seq2SeqConfig)
    longest = lm.config.encoder.max_seq_len if both else lm.config.max_seq_len - 1
    requests = [text if plain else [*_start(arguments), {"role": "user", "content": text}] for text, *_ in prompts]
    for request, (_, place, _) in zip(requests, prompts, strict=True):
        if (length := len(lm.encode(request))) > longest:
            raise ValueError(f"the prompt of {place} has {length} tokens; the model takes at most {longest}")
    return requests


def _note_empty(text: str, prompt: Prompt) -> None:
    """Say on standard error that a blank line is all that the model had to say."""
    if not text.strip():
        sys.stderr.write(f"note: the answer to the prompt of {prompt.place} is empty\n")


def _start(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Return what every conversation begins with."""
    return [{"role": "system", "content": arguments.system}] if arguments.system else []


def _options(arguments: argparse.Namespace, sampler: "Sampler") -> dict:
    length = {} if arguments.max_new_tokens is None else {"max_new_tokens": arguments.max_new_tokens}
    return {"sampler": sampler, "stop": arguments.stop} | length


def _search(arguments: argparse.Namespace) -> dict:
    """Return what is said of the search."""
    said = {"num_beams": arguments.num_beams, "length_penalty": arguments.length_penalty}
    return {name: value for name, value in said.items() if value is not None}


def _searches(arguments: argparse.Namespace) -> bool:
    return (arguments.num_beams or 1) > 1


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
