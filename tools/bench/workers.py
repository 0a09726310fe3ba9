"""Two persistent processes that take turns: each has its own Python, its own libraries, and compiles only once.

One JSON object per line: a request {"do": name, ...arguments} on standard input, a reply on standard output.
"""

import argparse
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable

from machine import ROOT, busy_s, foreign_share

PEER_PYTHON = sys.executable
OUR_PYTHON = str(ROOT / ".venv/bin/python")


class Worker:
    """The caller's side of one process.

    Args:
      python: interpreter; its environment has the libraries.
      script: file in tools/bench that calls `serve`.
      settings: handed to the script as JSON in its first argument.
    """

    def __init__(self, python: str, script: str, settings: dict, environment: dict[str, str] | None = None):
        command = [python, str(ROOT / "tools/bench" / script), json.dumps(settings)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        self._script = script
        self.versions = self._reply()["versions"]

    def call(self, do: str, **arguments: object) -> dict:
        """Let the process do one thing and return its reply.

        Raises:
          ValueError: the process died; its message is on standard error.
        """
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def measure(self, do: str, **arguments: object) -> dict:
        """`call`, with the share of the machine that others used meanwhile as "foreign"."""
        before, start = busy_s(), time.perf_counter()
        reply = self.call(do, **arguments)
        return {**reply, "foreign": foreign_share(before, reply["cpu_s"], time.perf_counter() - start)}

    def _reply(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"{self._script} ended with status {self._process.wait()}; its error message is above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def serve(handlers: dict[str, Callable[..., dict]], packages: tuple[str, ...]) -> None:
    """The process's side: answer requests until standard input ends."""
    # Libraries print to standard output; the replies go to a private copy of it.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(value: dict) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    versions = {name: importlib.metadata.version(name) for name in packages}
    reply({"versions": {"python": sys.version.split()[0], **versions}})
    for line in sys.stdin:
        request = json.loads(line)
        reply(handlers[request.pop("do")](**request))


def measured(function: Callable[[], dict]) -> dict:
    """Return the result of `function` with wall_s and cpu_s (user and system, all threads) that it took."""
    cpu, start = _cpu_s(), time.perf_counter()
    result = function()
    return {**result, "wall_s": time.perf_counter() - start, "cpu_s": _cpu_s() - cpu}


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every benchmark of two workers has."""
    parser.add_argument("--out", metavar="FILE", help="write the result as JSON")
    parser.add_argument(
        "--peer-python", default=PEER_PYTHON, help="Python with torch and transformers (default: %(default)s)"
    )
    parser.add_argument("--python", default=OUR_PYTHON, help="Python with jaxllm (default: %(default)s)")
    parser.add_argument(
        "--omp-wait-policy",
        choices=("ACTIVE", "PASSIVE"),
        help="of the peer. Default: unset, the library's own choice; PASSIVE on a busy machine, where spinning threads "
        "inflate the peer's CPU seconds",
    )
    parser.add_argument(
        "--peer-malloc",
        action="store_true",
        help="give the peer the memory settings that jaxllm gives itself (no mmap, no trim)",
    )


def peer_environment(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the environment variables of the peer that the flags ask for."""
    environment = {}
    if arguments.omp_wait_policy:
        environment["OMP_WAIT_POLICY"] = arguments.omp_wait_policy
    if arguments.peer_malloc:
        environment |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_ARENA_MAX": "1"}
    return environment
