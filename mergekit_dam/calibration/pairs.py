"""Rows that hold a request and its answer in columns of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_dam.calibration.messages import (
    Answered,
    Chat,
    Message,
    messages_in,
    parsed,
    tools_in,
)
from mergekit_dam.calibration.tally import Tally
from mergekit_dam.errors import CalibrationError

Columns = Mapping[str, Any]

_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately "
    "completes the request.\n\n"
)
_WITH_INPUT = ", paired with an input that provides further context"
"""The prompt of Stanford's Alpaca (github.com/tatsu-lab/stanford_alpaca), with which such data is
written for a model that has no chat template."""


def instruction(columns: Columns, origin: str, tally: Tally) -> Chat:
    """An Alpaca row: `instruction`, `input` and `output`; also `system` and `history`.

    As a chat, the user's message is instruction and input in two lines.
    """
    return _instructed(columns, _string(columns, ("output", "response"), origin), origin)


def _instructed(columns: Columns, answer: str, origin: str) -> Chat:
    asked = _string(columns, ("instruction",), origin)
    context = _string(columns, ("input", "context"), origin)
    system = _string(columns, ("system",), origin)
    question = "\n".join(filter(None, (asked, context)))
    turns = [*_history(columns.get("history"), origin), (question, answer)]
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for said, reply in turns:
        messages.append({"role": "user", "content": said})
        messages.append({"role": "assistant", "content": reply})
    plain = _ALPACA.format(_WITH_INPUT if context else "") if not system else f"{system}\n\n"
    plain += f"### Instruction:\n{asked}\n\n"
    plain += f"### Input:\n{context}\n\n" if context else ""
    plain += "### Response:\n"
    return Chat(tuple(messages), plain=Answered(plain + answer, len(plain)))


def prompt_and_completion(columns: Columns, origin: str, tally: Tally) -> str | Answered | Chat:
    """A `prompt` with its `completion`: two texts, which are put together, or two chats.

    A row with `label: false` has a completion that was rejected, and is empty.
    """
    if columns.get("label") is False:
        return ""
    prompt = _side(columns, ("prompt",), "user", origin, tally)
    answer = _side(columns, ("completion", "response"), "assistant", origin, tally)
    return _joined(prompt, answer, columns, origin)


def chosen_answer(columns: Columns, origin: str, tally: Tally) -> Answered | Chat:
    """A preference pair: the `chosen` answer, behind its prompt if it does not hold that."""
    chosen = _side(columns, ("chosen",), "assistant", origin, tally)
    if isinstance(chosen, str) and columns.get("instruction"):
        return _instructed(columns, chosen, origin)
    names = ("prompt", "question", "conversations", "conversation")
    prompt = _side(columns, names, "user", origin, tally)
    if isinstance(chosen, str) and "question" in columns and isinstance(prompt, str):
        return _instructed({**columns, "instruction": prompt}, chosen, origin)
    return _joined(prompt, chosen, columns, origin)


def _joined(
    prompt: str | tuple[Message, ...],
    answer: str | tuple[Message, ...],
    columns: Columns,
    origin: str,
) -> Answered | Chat:
    """Prompt and answer as one text, or as one chat if one of them is a chat.

    An answer that begins with the prompt, or with a message of the user, is the whole already.
    """
    if isinstance(prompt, str) and isinstance(answer, str):
        whole = answer if answer.startswith(prompt) else prompt + answer
        return Answered(whole, len(prompt))
    before, after = _messages(prompt, "user"), _messages(answer, "assistant")
    is_whole = bool(after) and (after[0]["role"] in ("user", "system"))
    messages = after if is_whole or after[: len(before)] == before else (*before, *after)
    tools = columns.get("tools") or columns.get("functions")
    return Chat(messages, tools_in(tools, f"{origin}: `tools`"))


def _messages(side: str | tuple[Message, ...], role: str) -> tuple[Message, ...]:
    if isinstance(side, str):
        return ({"role": role, "content": side},) if side else ()
    return side


def _side(
    columns: Columns, names: Sequence[str], role: str, origin: str, tally: Tally
) -> str | tuple[Message, ...]:
    """The value of the first of `names` that is not null: a text, or messages."""
    name = next((name for name in names if columns.get(name) is not None), None)
    if name is None:
        return ""
    value = columns[name]
    if isinstance(value, str):
        held = parsed(value)
        if not isinstance(held, list) or not all(isinstance(item, Mapping) for item in held):
            return value
        value = held
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise CalibrationError(
            f"{origin}: {name!r} must be a string or a list of messages; got {type(value).__name__}"
        )
    return messages_in(value, f"{origin}: {name!r}", tally)


def _string(columns: Columns, names: Sequence[str], origin: str) -> str:
    name = next((name for name in names if columns.get(name) is not None), None)
    if name is None:
        return ""
    if not isinstance(columns[name], str):
        raise CalibrationError(
            f"{origin}: {name!r} must be a string; got {type(columns[name]).__name__}"
        )
    return str(columns[name])


def _history(value: Any, origin: str) -> list[tuple[str, str]]:
    """Earlier turns, as pairs of a request and its answer."""
    turns = parsed(value) if isinstance(value, str) else value
    if not turns and not (isinstance(value, str) and value.strip() not in ("", "[]")):
        return []
    try:
        pairs = [(question, answer) for question, answer in turns]
    except (TypeError, ValueError):
        pairs = []
    if not pairs or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise CalibrationError(f"{origin}: 'history' must be a list of [request, answer] pairs")
    return pairs
