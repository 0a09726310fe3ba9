"""Reading a config schema: its sections and keys, and the --help that tyro prints of them."""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, Field, RootModel, create_model

KIND = "kind"  # the field that says which type of a choice is meant


class Section(NamedTuple):
    """One section of a schema, or one kind of it; `default` is None where another kind is, or where it is required."""

    name: str  # dotted; the item of a list is called 0
    model: type[BaseModel]
    text: str = ""
    default: BaseModel | None = None
    kinds: tuple[str, ...] = ()


def sections(above: Section) -> Iterator[Section]:
    """Yield `above` and every section below it, for a choice each kind, the default first."""
    yield above
    for name, field in above.model.model_fields.items():
        default = _default(above, name)
        found = models(field.annotation)
        kinds = tuple(kind for model in found for kind in own_kinds(model))
        full_name = f"{above.name}.{name}".lstrip(".") + (".0" if get_origin(field.annotation) is tuple else "")
        for model in sorted(found, key=lambda model: not isinstance(default, model)):
            given = default if isinstance(default, model) else None
            summary = (model.__doc__ or "").split("\n\n")[0] if kinds or len(found) > 1 else ""
            text = " ".join(f"{field.description or ''}; {summary}".strip("; ").split())
            yield from sections(Section(full_name, model, text, given, kinds))


def models(annotation: Any) -> list[type[BaseModel]]:
    """Return the config classes among the types of `annotation`: one for a section, several for a choice."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [] if issubclass(annotation, RootModel) else [annotation]
    return [model for part in get_args(annotation) for model in models(part)]


def keys(schema: type[BaseModel]) -> dict[str, list[str]]:
    """Return every dotted key, with the kinds of its section that have it; items of lists are called 0."""
    found: dict[str, list[str]] = {}
    for section in sections(Section("", schema)):
        for name in section.model.model_fields:
            owners = found.setdefault(f"{section.name}.{name}".lstrip("."), [])
            owners.extend(own_kinds(section.model))
    return found


def own_kinds(model: type[BaseModel]) -> tuple[str, ...]:
    """Return the kinds that a config class stands for, if it is one of a choice."""
    return get_args(model.model_fields[KIND].annotation) if KIND in model.model_fields else ()


def describe(schema: type[BaseModel]) -> str:
    """Return a text that lists every key with its meaning, type and default: a box per section and kind of section."""
    boxes: dict[tuple[str, type], str] = {}  # two optimizers have the same schedules: shown once, under the first
    first: dict[type, str] = {}
    repeated: list[str] = []  # sections like earlier ones elsewhere: one line each, and nothing of what is below them
    for section in sections(Section("", schema)):
        known = first.setdefault(section.model, section.name)
        if known != section.name:
            if not section.name.startswith(tuple(f"{name}." for name in repeated)):
                repeated.append(section.name)
                boxes[section.name, section.model] = f"{section.name}: {section.text}; its keys are those of {known}\n"
        elif (section.name, section.model) not in boxes:
            boxes[section.name, section.model] = _box(section)
    return "".join(boxes.values())


def _box(section: Section) -> str:
    """Let tyro print a section, and write keys and values as they are typed here: `lr=none`, not `--lr None`."""
    import tyro

    fields: dict[str, Any] = {}
    for name, field in section.model.model_fields.items():
        default = _default(section, name)
        if name == KIND:
            kinds = section.kinds if section.default else own_kinds(section.model)
            fields[name] = (Literal[kinds], Field(default if section.default else ..., description="which kind it is"))
        elif isinstance(default, RootModel):
            fields[name] = (str, Field(str(default.root), description=field.description))
        elif not models(field.annotation):
            fields[name] = (field.annotation, Field(default, description=field.description))
    if section.name:
        fields = {section.name: (create_model("Section", **fields), Field(description=section.text))}
    out = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding)  # tyro draws what this can show
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        config = (tyro.conf.FlagConversionOff,)
        tyro.cli(create_model("Keys", **fields), args=["--help"], use_underscores=True, config=config)
    out.seek(0)
    title = re.escape(f"{section.name} options".strip())
    box = re.split(rf"(?m)^(?=[^\w\n]+{title}[^\w\n]+$)", out.read())[-1]  # without usage and -h
    box = re.sub(r"(?m)^(. )--(?!help)", r"\1  ", box)
    return re.sub(r"\b(None|True|False)\b", lambda match: match[0].lower(), box)


def _default(section: Section, name: str) -> Any:
    """Return the default of a key of `section`; undefined if it must be given."""
    if section.default is not None:
        return getattr(section.default, name)
    return section.model.model_fields[name].get_default(call_default_factory=True, validated_data={})
