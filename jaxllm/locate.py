"""What a user calls MODEL: a run directory, one of its checkpoints, or a directory whose run.json names the run."""

from pathlib import Path

from jaxllm.core import files


def locate(model: str | Path) -> tuple[Path, int | None]:
    """Return (run directory, checkpoint step or None = newest) of MODEL.

    Raises:
      ValueError: it is no such thing; the message says what was looked for.
    """
    path = Path(model)
    if not path.exists():
        raise ValueError(f"{path} does not exist; MODEL is a run directory written by train or tune")
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return path.parent.parent, int(path.name)
    if not (path / "recipe.yaml").is_file() and (path / "run.json").is_file():
        path = path / files.read_json(path / "run.json")["model"]
    if not (path / "recipe.yaml").is_file():
        raise ValueError(f"{path} is no run directory (no recipe.yaml); give one that train or tune has written")
    return path, None
