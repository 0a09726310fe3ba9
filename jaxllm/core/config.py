"""Typed configuration: frozen schemas, YAML files, dotted overrides and their error messages.

File and command line are merged into one tree of plain values, and the schema validates that tree once. So `lr=3e-4`
has the type that the schema says wherever it is written, and all problems are reported together.
"""

import functools
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, RootModel, ValidationError, field_validator

from jaxllm.core import raw as raws
from jaxllm.core import schema as schemas
from jaxllm.core.raw import KIND, ConfigError, Location, Written, dotted


class Config(BaseModel):
    """Base of every config: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


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
) -> C:
    """Read a YAML file, apply dotted overrides and validate.

    An override is KEY=VALUE with VALUE in YAML: "optim.lr=3e-4", "data.sources.0.path=x", "mesh={data: 2}", "c=none".
    "optim.kind=muon" starts that section afresh if the file chose another kind; such switches are applied first.

    Args:
      path: YAML file; None = overrides alone.
      expand: called with the merged tree before validation; may replace a preset's name by its fields. Where the schema
        has sections, the tree has mappings, or None for a section without keys.
    Raises:
      ConfigError: with every problem found, one per line.
    """
    written = raws.read(Path(path)) if path is not None else Written()
    raws.apply(written, overrides)
    _check_sections(cls, written)
    try:
        tree = expand(written.tree) if expand else written.tree
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return _validate(cls, Written(_complete(cls, tree), written.lines, written.second))


def dump(config: Config) -> str:
    """Write a config as YAML, every key in the order of the schema; `load` reads an equal one back."""
    import yaml

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


def _validate(cls: type[C], written: Written) -> C:
    """Validate the tree; where a value is refused that can be read in a second way, try that."""
    while True:
        try:
            return cls.model_validate(written.tree)
        except ValidationError as error:
            refused = {_location(problem["loc"], written.tree) for problem in error.errors()} & written.second.keys()
            if not refused:
                raise ConfigError(_message(cls, error, written)) from None
        for location in refused:
            raws.parent(written.tree, location)[location[-1]] = written.second.pop(location)


def _check_sections(cls: type[Config], written: Written) -> None:
    """Refuse values where sections or lists of them belong, so that `expand` may rely on the shape of the tree."""
    problems = [
        f"{_place(written, location)}{dotted(location)}={_quoted(value)}: expected {schemas.words(annotation)}"
        for location, annotation, value in _misplaced(cls, written.tree, ())
    ]
    if problems:
        raise ConfigError(_listing(problems))


def _misplaced(annotation: Any, value: Any, location: Location) -> Iterator[tuple[Location, Any, Any]]:
    """Yield location, expected type and value wherever a section or a list of sections is something else."""
    choice = schemas.choose(annotation, value)
    is_section, is_list = schemas.variants(annotation), schemas.variants(schemas.item(annotation))
    if value is None or not (is_section or is_list):
        return
    if is_list and isinstance(value, list):
        for index, below in enumerate(value):
            yield from _misplaced(schemas.item(annotation), below, (*location, index))
    elif not isinstance(value, Mapping):
        yield location, annotation, value
    elif choice is not None:
        for name in [name for name in value if name in choice.model_fields]:
            yield from _misplaced(choice.model_fields[name].annotation, value[name], (*location, name))


def _complete(schema: type[BaseModel], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy in which a section given in part has the kind and values of its default for the rest."""
    done = dict(tree)
    for name in tree.keys() & schema.model_fields.keys():
        field = schema.model_fields[name]
        done[name] = _complete_value(field.annotation, tree[name], schemas.default(field))
    return done


def _complete_value(annotation: Any, value: Any, default: Any = None) -> Any:
    if isinstance(value, list):
        return [_complete_value(schemas.item(annotation), below) for below in value]
    if isinstance(value, bool) and not schemas.admits(annotation, bool):
        return schemas.show(value)  # pydantic reads true as the number 1; as text it is refused where a number belongs
    empty = value is None and not schemas.nullable(annotation)  # "optim:" with nothing below it
    if not schemas.variants(annotation) or not (empty or isinstance(value, Mapping)):
        return value
    value = dict(value or {})
    if isinstance(default, BaseModel):
        value = merge({"": default.model_dump(mode="json")}, {"": value})[""]
    choice = schemas.choose(annotation, value)
    return _complete(choice, value) if choice else value


def _location(place: Location, tree: Any) -> Location:
    """Translate pydantic's place of an error, which also names kinds and types that were tried, into the user's."""
    location: list[str | int] = []
    for part in place:
        if isinstance(tree, dict):
            if part not in tree and part == tree.get(KIND):
                continue
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int):
            tree = tree[part] if part < len(tree) else None
        else:
            break
        location.append(part)
    return tuple(location)


def _message(schema: type[Config], error: ValidationError, written: Written) -> str:
    problems = {}  # by location: a union of types reports each type that was tried
    for problem in error.errors():
        problems.setdefault(_location(problem["loc"], written.tree), problem)
    inner = [place for place in problems if not any(other[: len(place)] == place != other for other in problems)]
    return _listing(
        [_place(written, place) + _explain(schema, problems[place], place, written.tree) for place in inner]
    )


def _place(written: Written, location: Location) -> str:
    return f"{written.lines[location]}: " if location in written.lines else ""


def _listing(problems: list[str]) -> str:
    return problems[0] if len(problems) == 1 else f"{len(problems)} problems:\n  " + "\n  ".join(problems)


def _explain(schema: type[Config], problem: Any, location: Location, tree: dict[str, Any]) -> str:
    """Say what is wrong at `location`, with the value and what the schema expects there."""
    name, value, expected = dotted(location), problem["input"], schemas.expected(schema, tree, location)
    match problem["type"]:
        case "extra_forbidden":
            return _unknown(schema, location, tree)
        case "missing":
            return f"missing key {name!r}: expected {expected}"
        case "union_tag_not_found":
            return f"missing key '{name}.{KIND}', which says what {name!r} is: expected {expected}"
        case "union_tag_invalid":
            kinds = problem["ctx"]["expected_tags"].replace("'", "")
            return f"{name}.{KIND}={_quoted(value[KIND])}: expected one of {kinds}"
        case "value_error" if isinstance(value, dict):
            return f"{name}: {problem['ctx']['error']}" if name else str(problem["ctx"]["error"])
        case "value_error":
            return f"{name}={_quoted(value)}: {problem['ctx']['error']}"
    hint = "; put it in quotes" if problem["type"] == "string_type" and value is not None else ""
    return f"{name}={_quoted(value)}: expected {expected or problem['msg']}{hint}"


def _unknown(schema: type[Config], location: Location, tree: dict[str, Any]) -> str:
    name, kind = dotted(location), dotted((*location[:-1], KIND))
    spot = schemas.locate(schema, tree, location[:-1])
    owners = [schemas.tag(owner) for owner in schemas.variants(spot.annotation) if location[-1] in owner.model_fields]
    if owners:
        return f"unknown key {name!r} for {kind}={spot.value.get(KIND)}; it belongs to {kind}={' and '.join(owners)}"
    meant = schemas.nearest(schema, name)
    return f"unknown key {name!r}; " + (f"did you mean {meant!r}?" if meant else "--help lists all keys")


def _quoted(value: Any) -> str:
    plain = not isinstance(value, str) or re.fullmatch(r"[\w.+-]+", value)
    text = schemas.show(value) if plain else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


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


def _reason(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__
