"""HTML pages that need nothing else: no network, no script, no file beside them. One frame, page.html.j2, for all."""

import re
from importlib import resources
from typing import Any

import jaxllm


def render(package: str, template: str, **values: Any) -> str:
    """Return the page that `template`, a file of `package` which extends "page", makes of `values`.

    Templates also have `amount`, `duration` and `language`.
    """
    import jinja2

    read = lambda package, name: resources.files(package).joinpath(name).read_text("utf-8")
    sources = {"page": read(__package__, "page.html.j2"), template: read(package, template)}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(sources), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_printable,
    )  # fmt: skip
    helpers = {"amount": amount, "duration": duration, "language": language}
    return environment.get_template(template).render(**values, **helpers, version=jaxllm.__version__)


def amount(number: float) -> str:
    """Write a number to three digits: 6_391_808 -> "6.39 million"."""
    for size, word in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million")):
        if number >= size:
            return f"{number / size:.3g}{word}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """Write seconds as the two largest units: 272 -> "4 min 32 s"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m} min" if hours else f"{m} min {s} s" if m else f"{s} s"


def language(text: str) -> str:
    """Return the value of an HTML lang attribute: fonts and screen readers need to know Chinese."""
    return "zh-Hans" if re.search("[\u4e00-\u9fff]", text) else "en"


def _printable(value: object) -> object:
    """Show control characters, which HTML forbids, as their pictures: a model may write any byte."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", lambda found: chr(0x2400 + min(ord(found[0]), 0x21)), value)
