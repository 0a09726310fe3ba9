"""Apache Beam gives the data that the processes of this machine give."""

import json
import sys

import pytest

from jaxllm import prepare as command
from jaxllm.data.prepare import prepare
from jaxllm.data.prepare_config import PrepareConfig
from jaxllm.data.reading.sources import RowFiles

pytest.importorskip("apache_beam")


def content(directory):
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.stem != "report")
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def rows(tmp_path):
    """Four files of rows, with copies in each and between them."""
    for number in range(4):
        texts = [f"row {row % 20} of {row % 3 * number}" for row in range(60)]
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return RowFiles(path=str(tmp_path / "?.jsonl"))


def config(source, out, **changes):
    return PrepareConfig(
        inputs=(source,), out=str(out), part_bytes=1, tokenizer={"kind": "train", "vocab_size": 300}, validation=7,
        **changes,
    )  # fmt: skip


def test_beam_gives_the_same_bytes(tmp_path, rows):
    here = prepare(config(rows, tmp_path / "here"))
    there = prepare(config(rows, tmp_path / "there", engine={"kind": "beam"}))
    assert content(tmp_path / "here") == content(tmp_path / "there")
    differs = {"seconds": 0, "stages": {}, "directory": ""}
    assert here.model_copy(update=differs) == there.model_copy(update=differs)
    assert here.rules["duplicate"].dropped > 100 and len(here.rules["duplicate"].examples) == 3
    assert not list(tmp_path.glob(".*"))


def test_what_is_wrong_with_the_data_is_told_as_ever_and_the_rest_is_kept(tmp_path, rows, capsys):
    path = tmp_path / "2.jsonl"
    good = path.read_text()
    path.write_text(good + "{bad\n")
    flags = ["--jsonl", rows.path, "--out", str(tmp_path / "d"), "--tokenizer", "bytes", "--runner", "beam"]
    flags += ["part_bytes=1", "engine.options=[--runner=FnApiRunner]"]
    assert command.main(flags) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}:61: not JSON (")
    path.write_text(good)
    assert command.main(flags) is None
    assert "reading: 3 of 4 parts found done in " in capsys.readouterr().out


def test_without_beam_it_is_said_what_to_install(tmp_path, rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ValueError, match=r"engine\.kind=beam needs Apache Beam: pip install 'jaxllm\[beam\]'"):
        prepare(config(rows, tmp_path / "d", engine={"kind": "beam"}))
