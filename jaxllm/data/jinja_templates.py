"""The Jinja2 environment of chat templates, as Hugging Face's templates expect it.

Apart from `chat.py`, because Jinja2 takes a quarter of a second to import.
"""

import functools
import json
from datetime import datetime
from typing import ClassVar

import jinja2
import jinja2.ext
import jinja2.parser
import jinja2.sandbox
from jinja2 import nodes


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: prints the two marks of the render call around its body."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (
            nodes.Output([nodes.Name(name, "load")], lineno=line) for name in ("generation_start", "generation_end")
        )
        return [start, *body, end]


@functools.cache
def _compile(source: str) -> jinja2.Template:
    """Compile `source` in a sandbox: no attribute that changes an object or reaches Python's internals."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    return environment.from_string(source)


def render(source: str, **values: object) -> str:
    """Render a template.

    Raises:
      ValueError: a syntax error, or the template refuses the values (`raise_exception`) or fails on them.
    """
    try:
        return _compile(source).render(**values)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template has a syntax error in line {error.lineno}: {error.message}") from error
    except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"the chat template does not accept these messages: {error}") from error
