"""The frame of every command: what a user can repair is one line, what is our bug a traceback."""

import argparse
import difflib
import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


def command(main: Callable[[list[str] | None], int | None]) -> Callable[[list[str] | None], int | None]:
    """Decorate the `main` of a command: errors the user can repair become one line on stderr and exit status 2.

    ValueError and OSError are such errors; JAXLLM_TRACEBACK=1 shows where they were raised. Anything else is a bug of
    ours and keeps its traceback. Ctrl-C gives 130, and a reader that has gone away (`| head`) 141, as in a shell.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int | None:
        try:
            status = main(argv)
            sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            sys.stderr.write("\ninterrupted\n")
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains again when it flushes at exit
            return 141
        except (ValueError, OSError) as error:
            if os.environ.get("JAXLLM_TRACEBACK") == "1":
                traceback.print_exc()
            sys.stderr.write(f"error: {_reason(error)}\n")
            return 2

    return run


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the command line as the user's error that it is, in one line."""
        hint = f"{self.prog} --help lists all flags"
        words = message.partition("unrecognized arguments: ")[2].split()
        if unknown := [word.partition("=")[0] for word in words if word.startswith("-")]:
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, n=1)
            message, hint = f"unknown flag {unknown[0]}", f"did you mean {near[0]}?" if near else hint
        raise ValueError(f"{message}; {hint}")


def parser(doc: str, *, usage: str | None = None, add_help: bool = True) -> argparse.ArgumentParser:
    """Return a command line without arguments yet, described by the docstring of its module.

    Args:
      doc: "python -m jaxllm.VERB: what it does", and notes from the second line on.
      usage, add_help: as of argparse.
    """
    program, _, text = doc.partition(": ")
    does, _, notes = text.partition("\n")
    return _Parser(
        prog=program, description=does, epilog=notes, usage=usage, add_help=add_help, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def _reason(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__
