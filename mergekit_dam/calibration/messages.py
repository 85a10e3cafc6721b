"""Chats as people store them -> messages as chat templates read them.

Messages are those of OpenAI (`role`, `content`, `tool_calls`) or of ShareGPT (`from`, `value`).
The content may be a string or a list of parts, and a whole chat may be a string of JSON.
"""

import ast
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_dam.calibration.tally import Tally
from mergekit_dam.errors import CalibrationError

Message = Mapping[str, Any]

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Roles of ShareGPT and its relatives."""

_PRINTED = ("'role'", "'from'", "'type'", "'name'")
"""Keys of messages, tools or calls as Python prints them; other text is not worth the trial."""

_CALLS = ("function_call", "tool_call")  # roles whose value is a call of a tool, as JSON


@dataclass(frozen=True, slots=True)
class Answered:
    """A text that ends with an answer.

    Attributes:
        text: The whole.
        start: Where in it the answer begins.
    """

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat that a template turns into text.

    Attributes:
        messages: With a `role`, a `content` that is a string if it is there, and whatever else a
            template may read.
        tools: The tools that the assistant could call, as JSON schemas.
        plain: The text of the chat for a model that has no chat template, if the format has one.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    plain: Answered | None = None


def is_sharegpt(messages: Sequence[Any]) -> bool:
    """Whether the messages are ShareGPT's."""
    return bool(messages) and isinstance(messages[0], Mapping) and "from" in messages[0]


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages; an empty list is not."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    keys = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
    return all(
        isinstance(message, Mapping) and any(own <= message.keys() for own in keys)
        for message in value
    )


def parsed(value: str) -> Any:
    """The list or object that a string holds as JSON, or as Python prints it; None if neither.

    A table that was saved as .csv has lists as Python prints them.
    """
    text = value.strip()
    if not text or text[0] + text[-1] not in ("[]", "{}"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if not any(key in text for key in _PRINTED):
        return None
    try:
        with warnings.catch_warnings():  # of escapes that Python does not know
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def messages_in(value: Sequence[Any], place: str, tally: Tally) -> tuple[Message, ...]:
    """Messages of OpenAI or ShareGPT, as chat templates read them.

    Args:
        value: The messages.
        place: Where they stand, for errors: "a.jsonl line 3: 'messages'".
        tally: Counts, updated in place.

    Raises:
        CalibrationError: If a message has no role or no content, or an unknown role.
    """
    return tuple(
        _message(message, f"{place}: message {number}", tally)
        for number, message in enumerate(value, start=1)
    )


def tools_in(value: Any, place: str) -> tuple[Mapping[str, Any], ...]:
    """The tools of a chat as a list of JSON schemas, of OpenAI's form.

    Args:
        value: A list of tools, the same as a string of JSON, or None.
        place: Where it stands, for errors.

    Raises:
        CalibrationError: If it is none of these.
    """
    listed = parsed(value) if isinstance(value, str) else value
    if not listed and (listed is not None or not value):  # null, [], "", "[]"
        return ()
    if not isinstance(listed, (list, tuple)) or not all(isinstance(t, Mapping) for t in listed):
        raise CalibrationError(
            f"{place} must be a list of tools (JSON schemas), or the same as a string of JSON"
        )
    return tuple(
        {"type": "function", "function": tool} if "name" in tool and "type" not in tool else tool
        for tool in listed
    )


def _message(message: Any, place: str, tally: Tally) -> Message:
    if not isinstance(message, Mapping):
        raise CalibrationError(f"{place} must be an object; got {type(message).__name__}")
    role = message.get("role", message.get("from"))
    calls = message.get("tool_calls") or _as_calls(message.get("function_call"))
    has_content = "content" in message or "value" in message
    if not isinstance(role, str) or not (has_content or calls):
        raise CalibrationError(
            f"{place} must have a `role` and a `content` (or `from` and `value`); it has the keys "
            f"{', '.join(map(repr, message)) or 'none'}"
        )
    if "from" in message and role.lower() not in _ROLES:
        raise CalibrationError(
            f"{place} is `from` {role!r}; known are {', '.join(_ROLES)}: rename it"
        )
    content = _text(message.get("content", message.get("value")), place, tally)
    if role in _CALLS and content is not None and _as_calls(parsed(content)):
        calls, content = _as_calls(parsed(content)), None
    # As transformers does: a template takes a key that is null for one that has a value.
    others = {
        key: value
        for key, value in message.items()
        if value is not None and key not in ("from", "value", "content", "function_call")
    }
    result = {**others, "role": _ROLES.get(role.lower(), role)}
    if content is not None:
        result["content"] = content
    elif not calls:
        result["content"] = ""
    if calls:
        result["tool_calls"] = [_call(call) for call in calls]
    return result


def _text(content: Any, place: str, tally: Tally) -> str | None:
    """The text of a message's content; parts are joined by newlines, as servers do it."""
    if content is None or isinstance(content, str):
        return content
    parts = [content] if isinstance(content, Mapping) else content
    if not isinstance(parts, (list, tuple)):
        raise CalibrationError(
            f"{place}: `content` must be a string or a list of parts; got {type(content).__name__}"
        )
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(text, str):
            texts.append(text)
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            tally.parts[str(kind)] += 1
    return "\n".join(texts)


def _as_calls(value: Any) -> list[Any]:
    """A call (or several) without its envelope, as tool calls."""
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        return []
    return [{"type": "function", "function": call} for call in calls]


def _call(call: Any) -> Any:
    """A tool call whose arguments are an object: templates write them as JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    arguments = parsed(function["arguments"])
    if not isinstance(arguments, Mapping):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
