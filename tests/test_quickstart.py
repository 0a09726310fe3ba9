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
