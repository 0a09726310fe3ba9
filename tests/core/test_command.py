"""The frame of every command: one line for a user's error, a traceback for ours."""

import subprocess
import sys

import pytest

from jaxllm.core.command import command
from jaxllm.core.config import ConfigError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("unknown key 'x'"), "error: unknown key 'x'\n"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "error: No such file or directory: a.txt\n"),
        (OSError("disk is full"), "error: disk is full\n"),
        (ValueError(), "error: ValueError\n"),
    ],
)
def test_command_reports_user_errors_in_one_line(capsys, monkeypatch, error, line):
    @command
    def main(argv=None):
        raise error

    monkeypatch.delenv("JAXLLM_TRACEBACK", raising=False)
    assert main([]) == 2
    assert capsys.readouterr().err == line
    monkeypatch.setenv("JAXLLM_TRACEBACK", "1")
    assert main([]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.endswith(line)


def test_command_passes_everything_else(capsys):
    @command
    def main(argv=None):
        """Doc."""
        return {"int": 3, "none": None}[argv[0]]

    assert (main(["int"]), main(["none"]), main.__doc__) == (3, None, "Doc.")
    with pytest.raises(KeyError):
        main(["bug"])


def test_interrupt_is_130(capsys):
    @command
    def main(argv=None):
        raise KeyboardInterrupt

    assert main([]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_reader_that_goes_away_is_no_traceback():
    code = (
        "import sys; from jaxllm.core.command import command\n"
        "@command\ndef main(argv=None):\n  print('x' * 10**6)\n"
        "sys.exit(main())"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
