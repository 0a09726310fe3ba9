"""What the quickstart says; that it runs, `make quickstart` and its smoke test show."""

import pytest

from jaxllm import quickstart


@pytest.mark.parametrize("out", ["taken", "taken/inside"])
def test_a_file_in_the_place_of_the_directory_is_named(tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("mine")
    assert quickstart.main(["--out", out]) == 2
    assert capsys.readouterr() == ("", "error: taken is a file; name a directory\n")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_second_run_does_not_claim_the_time_of_the_first():
    assert quickstart._took(256.4, 0.0) == "256 s in all"
    assert quickstart._took(10.2, 256.4) == "The first run took 256 s, and this one 10 s"
