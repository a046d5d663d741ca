"""Jinja as chat templates for Hugging Face's transformers expect it, in a sandbox.

Templates come from strangers: no attribute that leads into the interpreter, no changing of arguments,
ranges of at most 100,000. What the sandbox cannot stop is a template that computes for long without
output, such as nested long loops: render templates of untrusted callers in a thread.
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequestError

if TYPE_CHECKING:  # importing it takes 40 ms, and only chats need it
    from jinja2 import Environment, Template

__all__ = ["compile_template", "reads_parts", "run_template"]

MAX_SOURCE = 1 << 20
MAX_OUTPUT = 1 << 26


@lru_cache(maxsize=32)
def compile_template(source: str) -> "Template":
    """The compiled template. Raises `InvalidRequestError` naming `chat_template`."""
    if len(source) > MAX_SOURCE:
        raise InvalidRequestError(
            f"the chat template is longer than {MAX_SOURCE} characters",
            parameter="chat_template",
            value=source,
        )
    try:
        template: Template = _environment().from_string(source)
        return template
    except Exception as error:  # Jinja lets what Python's own compiler raises through
        raise InvalidRequestError(
            f"the chat template does not compile: {error}; pass another chat_template=",
            parameter="chat_template",
            value=source,
        ) from error


@lru_cache(maxsize=1)
def _environment() -> "Environment":
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the model wrote, for training; here it only stands for its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # Its own scope, as in transformers: what the body sets is not seen outside.
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes for HTML.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


@lru_cache(maxsize=32)
def reads_parts(source: str) -> bool:
    """Whether a template goes through the parts of a message's content itself."""
    from jinja2 import nodes

    def is_content(node: nodes.Node) -> bool:
        if isinstance(node, nodes.Filter) and node.node is not None:
            return is_content(node.node)
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return (isinstance(node, nodes.Getattr) and node.attr == "content") or (
            isinstance(node, nodes.Name) and node.name == "content"
        )

    loops = _environment().parse(source).find_all(nodes.For)
    return any(is_content(loop.iter) for loop in loops)


def run_template(template: "Template", variables: dict[str, Any]) -> str:
    """The template's output. Raises `InvalidRequestError` naming `messages` where it refuses them."""
    pieces, length = [], 0
    try:
        for piece in template.generate(variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_OUTPUT:
                raise InvalidRequestError(
                    f"the chat template wrote more than {MAX_OUTPUT} characters", parameter="chat_template"
                )
    except InvalidRequestError:
        raise
    except Exception as error:  # a template can raise what Python can
        raise InvalidRequestError(
            f"the chat template refuses these messages: {str(error) or type(error).__name__}",
            parameter="messages",
            value=variables["messages"],
        ) from error
    return "".join(pieces)
