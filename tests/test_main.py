"""The console script lists the commands without importing them."""

import subprocess
import sys

import jaxllm
from jaxllm.__main__ import main, verbs


def test_listing_has_every_command_with_a_description(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for verb, text in verbs().items():
        assert text and f"  {verb:<12}{text}" in out
    assert "python -m" not in out


def test_listing_imports_no_command():
    code = (
        "import sys; from jaxllm.__main__ import main, verbs; main([])\n"
        "print([v for v in ('jax', 'pydantic', *(f'jaxllm.{v}' for v in verbs())) if v in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxllm {jaxllm.__version__}\n"


def test_unknown_command(capsys, monkeypatch):
    monkeypatch.setattr("jaxllm.__main__.verbs", lambda: {"train": "Train.", "sample": "Sample."})
    assert main(["tarin"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'tarin'; did you mean 'train'?\n"
    assert main(["xyz"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'xyz'; there are train, sample\n"


def test_the_names_of_the_package_are_there_and_cost_nothing_before_they_are_used():
    code = (
        "import sys, jaxllm as j; assert not {'jax', 'pydantic'} & {*sys.modules}; [getattr(j, n) for n in j.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
