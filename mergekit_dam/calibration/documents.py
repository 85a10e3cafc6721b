"""Rows -> documents: a text, or the tokens a user brings, each with where it came from."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from mergekit_dam.errors import CalibrationError

from .files import STANDARD_COLUMNS
from .rows import Row

Message = Mapping[str, Any]
RenderChat = Callable[[Sequence[Message], str], str]
"""(messages, origin for errors) -> the chat as text, with every special token written out."""


@dataclass(frozen=True, slots=True)
class Document:
    """One calibration document. `content` is text, or token ids to be taken as they are.

    `templated`: the text was made by a chat template, which wrote the special tokens.
    """

    content: str | Sequence[int]
    origin: str
    file: str | None = None
    templated: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it to calibrate on."""
        return not (self.content.strip() if isinstance(self.content, str) else self.content)


def documents_from(
    rows: Iterable[Row], *, column: str | None, render: RenderChat
) -> Iterator[Document]:
    """Turn rows into documents, lazily; empty ones are kept, for the reader to count.

    The value is that of `column`, else of the first of `text`, `messages` and `input_ids`
    that is not null. A string is a text, a list of {role, content} a chat, which `render`
    turns into text, and a list of integers token ids; null is an empty document.

    Raises CalibrationError naming the row for a column that does not exist (with those
    that do), and for a value of another type.
    """
    for row in rows:
        if isinstance(row.value, str):
            yield Document(row.value, row.origin, row.file)
        else:
            name, value = _pick(row.value, column, row.origin)
            yield _document(value, name, row, render)


def _pick(columns: Mapping[str, Any], column: str | None, origin: str) -> tuple[str, Any]:
    known = ", ".join(map(repr, columns)) or "none"
    if column is not None:
        if column in columns:
            return column, columns[column]
        close = get_close_matches(column, list(columns), n=1)
        remedy = f"did you mean `column={close[0]}`?" if close else "name one of these"
        raise CalibrationError(
            f"{origin} has no column {column!r}; its columns are {known}: {remedy}"
        )
    present = [name for name in STANDARD_COLUMNS if name in columns]
    if not present:
        raise CalibrationError(
            f"{origin} has none of the columns {', '.join(map(repr, STANDARD_COLUMNS))}; its "
            f"columns are {known}: write `:column=NAME` behind the source"
        )
    # Tables made of several sources hold every column in every row, most of them null.
    filled = [name for name in present if columns[name] is not None]
    name = (filled or present)[0]
    return name, columns[name]


def _document(value: Any, name: str, row: Row, render: RenderChat) -> Document:
    if value is None or isinstance(value, str):
        return Document(value or "", row.origin, row.file)
    if isinstance(value, (list, tuple)):
        if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            return Document(tuple(value), row.origin, row.file)
        if all(isinstance(item, Mapping) for item in value):
            messages = [_message(item, number, name, row) for number, item in enumerate(value, 1)]
            return Document(render(messages, row.origin), row.origin, row.file, templated=True)
    raise CalibrationError(
        f"{row.origin}: {name!r} must be a string, a list of {{role, content}} messages or a "
        f"list of token ids; got {_describe(value)}"
    )


def _message(message: Mapping[str, Any], number: int, name: str, row: Row) -> Message:
    if not isinstance(message.get("role"), str) or "content" not in message:
        raise CalibrationError(
            f"{row.origin}: message {number} of {name!r} must have a `role` (a string) and a "
            f"`content`; it has the keys {', '.join(map(repr, message)) or 'none'}"
        )
    # Parquet fills absent keys with null, which templates would take for present ones.
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _describe(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        kinds = sorted({type(item).__name__ for item in value})
        return f"a list of {' and '.join(kinds)}"
    return type(value).__name__
