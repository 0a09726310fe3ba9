"""What the user wrote: a YAML file with dotted overrides on top, as one tree of plain values.

No schema is known here: `core.config` validates the tree.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml

KIND = "kind"  # the field that says which type of a choice is meant
Location = tuple[str | int, ...]
_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


class ConfigError(ValueError):
    """What the user wrote in a file or on the command line is not a valid configuration."""


@dataclass
class Written:
    """The merged tree, and where its parts come from.

    Attributes:
      tree: plain values.
      lines: "file:line" of every key that comes from the file.
      second: for values that can be read in two ways, the reading to try if the schema refuses the first.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    lines: dict[Location, str] = field(default_factory=dict)
    second: dict[Location, Any] = field(default_factory=dict)


def read(path: Path) -> Written:
    """Parse a YAML file and remember the line of each key.

    Raises:
      ConfigError: no such file, not UTF-8, not YAML, no mapping, or a key given twice.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        places = list(_places(node)) if node else []
        tree = loader.construct_document(node) if node else {}
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory; give a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file in UTF-8 (byte {error.start})") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values, found {str(tree)[:60]!r}")
    lines: dict[Location, str] = {}
    second: dict[Location, Any] = {}
    for location, line, value in places:
        if location in lines:
            raise ConfigError(f"{path}:{line}: key {dotted(location)!r} is already given at {lines[location]}")
        lines[location] = f"{path}:{line}"
        if value in ("none", "None"):  # text in YAML, but our help says "none": null where the schema refuses text
            second[location] = None
    return Written(tree, lines, second)


def _places(node: "yaml.Node", location: Location = ()) -> Iterator[tuple[Location, int, Any]]:
    """Yield location, line and text (None for a section) of every key and list item below `node`."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, value) for key, value in node.value if key.value != "<<"]
    elif isinstance(node, yaml.SequenceNode):
        children = [(index, value, value) for index, value in enumerate(node.value)]
    else:
        return
    for name, place, child in children:
        text = child.value if isinstance(child, yaml.ScalarNode) else None
        yield (*location, name), place.start_mark.line + 1, text
        yield from _places(child, (*location, name))


def apply(written: Written, overrides: Sequence[str]) -> None:
    """Put "key=value" overrides on top, switches of `kind` first: "optim.kind=muon" starts that section afresh.

    Raises:
      ConfigError: an override is not key=value, or leads through a value that has no keys.
    """
    pairs = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not _KEY.fullmatch(key):
            raise ConfigError(f"{override!r} is not an override; write key=value, such as optim.lr=3e-4")
        pairs.append((tuple(int(part) if part.isdigit() else part for part in key.split(".")), text))
    switches = sorted((pair for pair in pairs if pair[0][-1] == KIND), key=lambda pair: len(pair[0]))
    for location, text in switches + [pair for pair in pairs if pair[0][-1] != KIND]:
        container = parent(written.tree, location)
        name = location[-1]
        value = text if name == KIND else parse(text)  # a kind may be called "none"
        if name == KIND and container.get(name, value) != value:
            container.clear()
            _forget(written, location[:-1])
        _forget(written, location)
        if isinstance(container, list) and name == len(container):
            container.append(None)
        container[name] = value
        if value != text:
            written.second[location] = text


def _forget(written: Written, location: Location) -> None:
    """Drop what is known about `location` and everything below it."""
    for notes in (written.lines, written.second):
        for known in [known for known in notes if known[: len(location)] == location]:
            del notes[known]


def parse(text: str) -> Any:
    """Read a value from the command line as YAML, but plain words as they are: `out=a: #1` is text."""
    import yaml

    if text in ("", "none", "None", "null"):
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return text if value is None or (isinstance(value, str) and text[0] not in "'\"") else value


def parent(tree: Any, location: Location) -> Any:
    """Return the section or list that holds `location`, making missing ones on the way."""
    for depth, part in enumerate(location):
        where = dotted(location[:depth])
        if isinstance(tree, list) and not (isinstance(part, int) and part <= len(tree)):
            raise ConfigError(
                f"{dotted(location)!r}: {where!r} is a list of {len(tree)} so far; the next item is {where}.{len(tree)}"
            )
        if not isinstance(tree, dict | list):
            raise ConfigError(f"{dotted(location)!r}: {where!r} is {tree!r}, which has no keys")
        if depth == len(location) - 1:
            break
        if isinstance(tree, list) and part == len(tree):
            tree.append(None)
        if (tree[part] if isinstance(tree, list) else tree.get(part)) is None:
            tree[part] = [] if isinstance(location[depth + 1], int) else {}
        tree = tree[part]
    return tree


def dotted(location: Location) -> str:
    """Write a location as the user does: data.sources.0.path."""
    return ".".join(map(str, location))
