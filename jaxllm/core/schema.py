"""Reading a config schema: which keys it has, what each accepts in plain words, and which key was probably meant.

Works on the classes alone and knows nothing of files or the command line; `core.config` turns what it says into errors,
and `describe` is the --help text.
"""

import difflib
import shutil
import textwrap
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import MinLen
from pydantic import BaseModel, RootModel
from pydantic.fields import FieldInfo

from jaxllm.core.raw import KIND, Location

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "none",
}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


class Key(NamedTuple):
    """One dotted key of a schema.

    Attributes:
      name: "optim.lr"; an item of a list has index 0.
      text: what it means, in one line.
      type: what it accepts, in plain words; empty for a heading.
      default: as one would type it; None if the key must be given.
    """

    name: str
    text: str
    type: str
    default: str | None


def variants(annotation: Any) -> tuple[type[BaseModel], ...]:
    """Return the config classes among the types of `annotation`: one for a section, several for a choice."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return () if issubclass(annotation, RootModel) else (annotation,)
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return tuple(variant for part in get_args(annotation) for variant in variants(part))
    return ()


def tag(variant: type[BaseModel]) -> str | None:
    """Return the `kind` of a class that is one type of a choice, else None."""
    field = variant.model_fields.get(KIND)
    return None if field is None else field.default


def choose(annotation: Any, raw: Any) -> type[BaseModel] | None:
    """Return the class that the mapping `raw` is meant for, or None if it does not say or is no section."""
    options = variants(annotation)
    if len(options) == 1:
        return options[0]
    kind = raw.get(KIND) if isinstance(raw, dict) else None
    return next((option for option in options if tag(option) == kind), None)


def item(annotation: Any) -> Any:
    """Return the type of the items of a list, or of the values of a dict; None for anything else."""
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return next((found for found in map(item, get_args(annotation)) if found is not None), None)
    if get_origin(annotation) in (list, tuple):
        return get_args(annotation)[0]
    return get_args(annotation)[1] if get_origin(annotation) is dict else None


def nullable(annotation: Any) -> bool:
    """Whether none is an allowed value."""
    return annotation in (None, type(None)) or any(
        nullable(part) for part in get_args(annotation) if get_origin(annotation) in (Union, types.UnionType, Annotated)
    )


def admits(annotation: Any, kind: type) -> bool:
    """Whether `kind` is among the types of `annotation`, or that is too free to tell."""
    return annotation in (kind, Any, object, None) or any(admits(part, kind) for part in get_args(annotation))


class Spot(NamedTuple):
    """What a schema and a tree have at one location.

    Attributes:
      annotation: the type; None if the schema has no such key.
      limits: bounds of that type.
      value: what the tree has there, or None.
    """

    annotation: Any
    limits: Sequence[Any]
    value: Any


def locate(schema: type[BaseModel], tree: Any, location: Location) -> Spot:
    """Follow `location` through the schema, given the choices made in `tree`."""
    spot = Spot(schema, (), tree)
    for part in location:
        annotation, _, value = spot
        choice = choose(annotation, value)
        field = choice.model_fields.get(str(part)) if choice else None
        if isinstance(value, list):
            below = value[part] if isinstance(part, int) and part < len(value) else None
        else:
            below = value.get(part) if isinstance(value, dict) else None
        spot = Spot(field.annotation, field.metadata, below) if field else Spot(item(annotation), (), below)
        if spot.annotation is None:
            return spot
    return spot


def expected(schema: type[BaseModel], tree: Any, location: Location) -> str | None:
    """Say in words what the key at `location` accepts; None if there is no such key."""
    spot = locate(schema, tree, location)
    return None if spot.annotation is None else words(spot.annotation, spot.limits)


def words(annotation: Any, limits: Sequence[Any] = ()) -> str:
    """Say in plain words what a type accepts: "a number > 0", "text or none", "one of adamw, muon"."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return words(parts[0], [limit for extra in parts[1:] for limit in _limits(extra)])
    if annotation in (int, float):
        return " ".join([_WORDS[annotation], " and ".join(_bounds(limits))]).strip()
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin is Literal:
        return f"one of {', '.join(show(part) for part in parts)}" if len(parts) > 1 else show(parts[0])
    if options := variants(annotation):
        kinds = [tag(option) or "" for option in options]
        text = f"a section of kind {' or '.join(kinds)}" if len(kinds) > 1 else "a section (keys and values)"
        return f"{text} or none" if nullable(annotation) else text
    if origin in (Union, types.UnionType):
        return " or ".join(words(part, limits) for part in parts)
    if origin is tuple and Ellipsis not in parts:
        return f"a list of {len(parts)} ({', '.join(words(part) for part in parts)})"
    if origin in (list, tuple):
        least = next((f" of at least {limit.min_length}" for limit in limits if isinstance(limit, MinLen)), "")
        return f"a list{least}, each {words(parts[0])}"
    if origin is dict:
        return f"names, each with {words(parts[1])}"
    return getattr(annotation, "model_config", {}).get("title") or getattr(annotation, "__name__", str(annotation))


def _limits(extra: Any) -> list[Any]:
    return extra.metadata if isinstance(extra, FieldInfo) else [extra]


def _bounds(limits: Sequence[Any]) -> list[str]:
    bounds = [(sign, getattr(limit, name, None)) for limit in limits for name, sign in _BOUNDS.items()]
    return [f"{sign} {bound:g}" for sign, bound in bounds if bound is not None]


def show(value: Any) -> str:
    """Write a value the way one would type it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, RootModel):
        return show(value.root)
    if isinstance(value, BaseModel):
        return tag(type(value)) or "section"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(show, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value) if value != "" else '""'


def keys(schema: type[BaseModel], prefix: str = "", defaults: BaseModel | None = None) -> Iterator[Key]:
    """Yield every dotted key below `prefix`: values first, then the sections with a heading each.

    Args:
      defaults: the section's default; its values are the defaults where it is of type `schema`.
    """
    sections = []
    for name, field in schema.model_fields.items():
        given = getattr(defaults, name) if isinstance(defaults, schema) else default(field)
        if variants(field.annotation):
            sections.append((prefix + name, field.description or "", variants(field.annotation), given))
            continue
        if name != KIND:
            shown = None if given is ... else show(given)
            yield Key(prefix + name, field.description or "", words(field.annotation, field.metadata), shown)
        if items := variants(item(field.annotation)):
            sections.append((f"{prefix}{name}.0", "first of the list, the next is 1", items, ...))
    for name, text, options, given in sections:
        yield from _section(name, text, options, given)


def _section(name: str, text: str, options: Sequence[type[BaseModel]], given: Any) -> Iterator[Key]:
    yield Key(name, text, "", None)
    if len(options) > 1:
        kinds = "; ".join(f"{tag(option)}: {_summary(option)}" for option in options)
        kind = None if given is ... else show(given)
        yield Key(f"{name}.{KIND}", kinds, f"one of {', '.join(str(tag(option)) for option in options)}", kind)
    for option in options:
        below = list(keys(option, f"{name}.", given if isinstance(given, option) else None))
        if below and len(options) > 1:
            yield Key(name, f"with {KIND}={tag(option)}", "", None)
        yield from below


def default(field: FieldInfo) -> Any:
    """Return the default of a field, or Ellipsis if it must be given."""
    return ... if field.is_required() else field.get_default(call_default_factory=True, validated_data={})


def _summary(schema: type[BaseModel]) -> str:
    first = (schema.__doc__ or "").strip().split("\n\n")[0]
    return " ".join(first.split()).split(". ")[0].rstrip(".")


def nearest(schema: type[BaseModel], name: str) -> str | None:
    """Return the key that a misspelt `name` most likely means: same last word elsewhere, or similar spelling."""
    parts = ["0" if part.isdigit() else part for part in name.split(".")]
    known = {key.name for key in keys(schema)} | {key.name.rpartition(".")[0] for key in keys(schema)} - {""}
    same_word = [key for key in known if key.rpartition(".")[2] == parts[-1]]
    found = difflib.get_close_matches(".".join(parts), sorted(same_word), n=1, cutoff=0.0) or difflib.get_close_matches(
        ".".join(parts), sorted(known), n=1, cutoff=0.6
    )
    if not found:
        return None
    given = name.split(".")  # name the user's own list index, not 0
    return ".".join(
        given[i] if part == "0" and i < len(given) and given[i].isdigit() else part
        for i, part in enumerate(found[0].split("."))
    )


def describe(schema: type[BaseModel]) -> str:
    """Return a text that lists every dotted key with its meaning, type and default, grouped by section."""
    width = min(120, shutil.get_terminal_size((100, 24)).columns)
    lines = []
    for key in keys(schema):
        if not key.type:
            lines += ["", f"{key.name}: {key.text}"]
            continue
        default = "required" if key.default is None else f"default {key.default}"
        text = f"{key.text} ({key.type}; {default})"
        label = f"  {key.name} ".ljust(34)
        lines += textwrap.wrap(text, width, initial_indent=label, subsequent_indent=" " * 34)
    return "\n".join(lines)
