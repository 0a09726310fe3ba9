"""Typed configuration: frozen schemas, YAML files, dotted overrides.

Every scalar in a file or on the command line is text until pydantic reads it, so `lr: 3e-4`, `out=2024` and `clip=none`
mean what the schema says, wherever they stand. Both are merged into one tree, which is validated once: all problems are
reported together.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, RootModel, ValidationError, field_validator, model_validator

from jaxllm.core.schema import KIND, keys

NONE = (None, "", "none", "None", "null", "~")  # how one writes none


class ConfigError(ValueError):
    """What the user wrote in a file or on the command line is not a valid configuration."""


class Config(BaseModel):
    """Base of every config: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Read none where it is allowed, and give a section that is there in part the rest of its default."""
        if not isinstance(given, Mapping):
            return given
        values = dict(given)
        for name in cls.model_fields.keys() & values.keys():
            field, value = cls.model_fields[name], values[name]
            default = field.get_default(call_default_factory=True, validated_data={})
            if value in NONE and type(None) in get_args(field.annotation):
                values[name] = None
            elif isinstance(default, Config) and (value in (None, "") or isinstance(value, Mapping)):
                kind = {KIND: getattr(default, KIND)} if hasattr(default, KIND) else {}
                # What the default leaves open, the section completes itself: it may have a preset.
                known = kind | default.model_dump(exclude_unset=True)
                values[name] = merge({"": known}, {"": value or {}})[""]
        return values


class Record(BaseModel):
    """Base of what programs write for programs, such as a manifest: as closed as Config, but nobody configures it."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


C = TypeVar("C", bound=Config)


class Duration(RootModel[int | str]):
    """A length of training: 10000 (steps), "2e9 tokens" or "1.5 epochs"."""

    model_config = ConfigDict(frozen=True, title='a number of steps, "2e9 tokens" or "1 epoch"')

    @field_validator("root", mode="before")
    @classmethod
    def _parse(cls, value: object) -> int | str:
        number_text, _, unit = str(value).strip().lower().partition(" ")
        unit = unit.strip().removesuffix("s") or "step"
        try:
            number = float(number_text)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf or unit not in ("step", "token", "epoch"):
            raise ValueError(f"expected {cls.model_config['title']}, more than 0")
        if unit != "step":
            return f"{number:.12g} {unit}{'' if number == 1 else 's'}"
        if number != int(number):
            raise ValueError("expected a whole number of steps")
        return int(number)

    def resolve(self, steps_per_epoch: float, tokens_per_step: float) -> int:
        """Return the number of whole steps that fit into this duration, at least 1."""
        if isinstance(self.root, int):
            return self.root
        number, unit = self.root.split()
        steps = float(number) * (steps_per_epoch if unit.startswith("epoch") else 1 / tokens_per_step)
        return max(1, math.floor(steps * (1 + 1e-12)))  # 0.29 * 100 is 28.999999999999996


def load(
    cls: type[C],
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    expand: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    commands: Mapping[str, str] = MappingProxyType({}),
    ways: Mapping[str, str] = MappingProxyType({}),
) -> C:
    """Read a YAML file, apply dotted overrides and validate.

    An override is KEY=VALUE: "optim.lr=3e-4", "data.sources.0.path=x", "mesh={data: 2}", "clip=none". "optim.kind=muon"
    starts that section afresh if the file chose another kind; such switches are applied first.

    Args:
      expand: called with the merged tree of mappings, lists and texts, of any shape; may replace a preset's name by its
        fields.
      commands: the command that a file with this key is for, instead.
      ways: what to write for a key, or for several of a section at once, instead: {"model": "model.preset=NAME"}.
    Raises:
      ConfigError: with every problem found, one per line.
    """
    tree = {} if path is None else read(path)
    if other := next((command for key, command in commands.items() if key in tree), None):
        raise ConfigError(f"{path} is a recipe of {other}; run: python -m jaxllm.{other} {path}")
    pairs = [_pair(override) for override in overrides]
    for key, value in sorted(pairs, key=lambda pair: pair[0].count(".") if pair[0].endswith(f".{KIND}") else math.inf):
        _assign(tree, key, value)
    tree = expand(tree) if expand else tree
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        first = {}  # for each key: a union reports every type that it tried
        for problem in error.errors():
            first.setdefault(place(problem, tree), problem)
        problems = {key: _explain(cls, key, problem, ways) for key, problem in first.items()}
        for section, way in ways.items():
            missing = [key for key in first if key.startswith(f"{section}.") and first[key]["type"] == "missing"]
            if len(missing) > 1:
                problems = {key: text for key, text in problems.items() if key not in missing[1:]}
                problems[missing[0]] = f"missing keys {', '.join(map(repr, missing))}; give {way}, which has them all"
        # A list with a wrong item is also reported, as too short.
        found = [text for key, text in problems.items() if not any(below.startswith(f"{key}.") for below in problems)]
    raise ConfigError(found[0] if len(found) == 1 else f"{len(found)} problems:\n  " + "\n  ".join(found))


def read(path: str | Path) -> dict[str, Any]:
    """Parse a YAML file into mappings, lists and texts.

    Raises:
      ConfigError: not YAML in UTF-8, no mapping, or a key given twice.
    """
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.load(file, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path} has no keys and values, but {str(tree)[:60]!r}")
    return tree or {}


class _Loader(yaml.SafeLoader):
    """YAML with every scalar as text, in which a key may be given only once."""

    yaml_implicit_resolvers: ClassVar = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # but `<<: *other` merges

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for position, (key, _) in enumerate(node.value):
            if key.value in names[:position]:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def dump(config: Config) -> str:
    """Write a config as YAML, every key in the order of the schema; `load` reads an equal one back."""
    values = config.model_dump(mode="json")
    lossy = re.search(r"\\(x85|u2028|u2029|ufeff)", repr(values))  # PyYAML writes these plainly, reads them as spaces
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=not lossy, width=120)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over` on top, section by section; another `kind` replaces the whole section."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            same = value.get(KIND, below.get(KIND)) == below.get(KIND)
            merged[key] = merge(below, value) if same else dict(value)
        else:
            merged[key] = value
    return merged


def _pair(override: str) -> tuple[str, Any]:
    """Split KEY=VALUE. Values in brackets or quotes are YAML, others plain text: `out=a: #1` is text."""
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)*", key):
        raise ConfigError(f"{override!r} is not an override; write key=value, such as optim.lr=3e-4")
    try:
        return key, yaml.load(text, _Loader) if text[:1] in ("[", "{", "'", '"') else text
    except yaml.YAMLError:
        return key, text


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set one dotted key; a list may grow by one item, and another kind clears its section."""
    above: Any = {"": tree}
    name: str | int = ""
    parts = key.split(".")
    for depth, part in enumerate(parts):
        section = above[name]
        if not isinstance(section, dict | list):
            section = above[name] = [] if part.isdigit() else {}
        above, name = section, part
        if isinstance(section, dict):
            section.setdefault(part, None)
        elif part.isdigit() and int(part) <= len(section):
            name = int(part)
            section += [None] * (name == len(section))
        else:
            where = ".".join(parts[:depth])
            raise ConfigError(f"{key}: {where} is a list of {len(section)}; the next item is {where}.{len(section)}")
    if name == KIND and above[name] not in (None, value):
        above.clear()
    above[name] = value


def place(problem: Any, tree: Any) -> str:
    """Return the dotted key of a problem: pydantic's place without the kinds and types that it tried."""
    key = []
    for depth, part in enumerate(problem["loc"], 1):
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            if problem["type"] != "missing" or depth < len(problem["loc"]):
                continue
        key.append(str(part))
    return ".".join(key)


def _explain(schema: type[Config], key: str, problem: Any, ways: Mapping[str, str]) -> str:
    value, context = problem["input"], problem.get("ctx", {})
    said = problem["msg"].removeprefix("Input ").replace("Tuple", "list").replace("tuple", "list")
    match problem["type"]:
        case "extra_forbidden":
            return _unknown(schema, key, problem, [way.partition("=")[0] for way in ways.values() if "=" in way])
        case "missing":
            first, known = key, keys(schema)
            while below := next((other for other in known if other.startswith(f"{first}.")), None):
                first = below
            way = ways.get(key, f"{first}=...")
            return f"missing key {key!r}; give {way} on the command line, or write it into the recipe"
        case "union_tag_not_found":
            return f"missing key '{key}.{KIND}', which says what {key!r} is"
        case "union_tag_invalid":
            key, value, said = f"{key}.{KIND}", value[KIND], f"should be one of {context['expected_tags']}"
        case "value_error" if isinstance(value, Mapping):
            return f"{key}: {context['error']}".removeprefix(": ")
        case "value_error":
            said = context["error"]
        case "model_type" | "model_attributes_type":
            said = "should be a section (keys and values)"
    return f"{key}={str(value)[:80]}: {said}"


def _unknown(schema: type[Config], key: str, problem: Any, more: Sequence[str]) -> str:
    """Name the key that was probably meant: one of another kind, the same word elsewhere, or a similar spelling.

    Args:
      more: keys that are written and are not of the schema.
    """
    section, _, word = key.rpartition(".")
    known, general = keys(schema), re.sub(r"\.\d+(?=\.)", ".0", key)
    if owners := known.get(general):
        kind, place = f"{section}.{KIND}", problem["loc"]
        return f"unknown key {key!r} for {kind}={place[-2]}; it belongs to {kind}={' or '.join(dict.fromkeys(owners))}"
    same = [other for other in known if other.rpartition(".")[2] == word]
    fit = [other for other in known if (other in _holders(known)) == isinstance(problem["input"], Mapping)]
    pools, cutoff = ([same] if same else [[*fit, *more], [*known]]), 0.0 if same else 0.6
    near = next(filter(None, (difflib.get_close_matches(general, pool, n=1, cutoff=cutoff) for pool in pools)), [])
    items = iter(re.findall(r"\.(\d+)(?=\.)", key))  # the user's own list items
    meant = [re.sub(r"\.0(?=\.)", lambda _: f".{next(items, 0)}", other) for other in near]
    return f"unknown key {key!r}; " + (f"did you mean {meant[0]!r}?" if meant else "--help lists all keys")


def _holders(known: Iterable[str]) -> set[str]:
    """Return the keys that have others below them: sections, lists of sections."""
    return {key[: dot.start()] for key in known for dot in re.finditer(r"\.", key)}
