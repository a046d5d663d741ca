"""Checks chat messages and tools, and makes them what chat templates expect."""

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import InvalidRequestError

__all__ = ["check_messages", "check_tools", "check_variables", "refusal"]

MAX_DEPTH = 64

# Names under which callers pass, and templates read, the reasoning of earlier turns.
REASONING = ("reasoning_content", "thinking", "reasoning")

RESERVED = (
    "messages",
    "conversation",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
    "return_tensors",
    "padding",
    "truncation",
    "max_length",
)
"""Arguments of `ChatTemplate.render`, and of what transformers calls `apply_chat_template`."""


def check_messages(messages: Any, *, takes_parts: bool) -> list[dict[str, Any]]:
    """The messages as plain values, without None, as templates expect them."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise refusal("messages", messages, "must be a list of mappings with 'role' and 'content'")
    if not messages:
        raise refusal("messages", messages, "must not be empty")
    chat = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise refusal("messages", message, "must be a mapping with 'role' and 'content'", where)
        if not isinstance(message.get("role"), str):
            raise refusal("messages", message.get("role"), "must be a string", f"{where}['role']")
        fields = plain({key: value for key, value in message.items() if value is not None}, "messages")
        if "content" in fields:
            fields["content"] = _check_content(fields["content"], f"{where}['content']", takes_parts)
        if isinstance(calls := fields.get("tool_calls"), list):
            for call in calls:
                _read_arguments(call)
        reasoning = next((fields[name] for name in REASONING if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        chat.append(fields)
    return chat


def _read_arguments(call: Any) -> None:
    """Of a tool call as OpenAI's API has it, with its arguments as JSON text, makes what templates read."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except (ValueError, RecursionError):
            return  # models write broken JSON too; the template shows it as it is
        if isinstance(arguments, dict):
            function["arguments"] = arguments


def _check_content(content: Any, where: str, takes_parts: bool) -> Any:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise refusal("messages", content, "must be a string or a list of text parts", where)
    texts = []
    for number, part in enumerate(content):
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise refusal(
                "messages",
                part,
                'must be {"type": "text", "text": ...}: only text is taken',
                f"{where}[{number}]",
            )
        texts.append(text)
    return [{"type": "text", "text": text} for text in texts] if takes_parts else "\n".join(texts)


def check_tools(tools: Any) -> list[Any] | None:
    """The tools' JSON schemas as plain values."""
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise refusal("tools", tools, "must be a list of JSON schemas (mappings)")
    schemas: list[Any] = plain(list(tools), "tools")
    return schemas


def check_variables(variables: Any) -> dict[str, Any]:
    """What a caller wants the template to see besides the messages, as plain values."""
    if variables is None:
        return {}
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise refusal("chat_template_kwargs", variables, "must be a mapping of names to values")
    for name in RESERVED:
        if name in variables:
            raise refusal(
                "chat_template_kwargs", variables, f"has {name!r}, which is not for the template to be given"
            )
    fields: dict[str, Any] = plain(variables, "chat_template_kwargs")
    return fields


def plain(value: Any, parameter: str, depth: int = 0) -> Any:
    """A copy of JSON-like data made of exact built-in types, so that a template meets no other object."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > MAX_DEPTH:
        raise InvalidRequestError(
            f"{parameter} is nested deeper than {MAX_DEPTH} levels", parameter=parameter
        )
    for kind, exact in _EXACT:
        if isinstance(value, kind):
            return exact(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise refusal(parameter, key, "is a key; JSON's keys are strings")
        return {str.__str__(key): plain(item, parameter, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, parameter, depth + 1) for item in value]
    raise refusal(parameter, value, f"is of type {type(value).__name__}; only JSON's types are taken")


# What subclasses (enums, NumPy's scalars) are underneath, whatever they override.
_EXACT: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
)


def refusal(parameter: str, value: Any, rule: str, where: str | None = None) -> InvalidRequestError:
    """The error that `value`, the argument `parameter` or something in it (at `where`), breaks a rule."""
    shown = reprlib.repr(value)
    return InvalidRequestError(f"{where or parameter}={shown} {rule}", parameter=parameter, value=value)
