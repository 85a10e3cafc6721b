"""Rows -> documents: texts or a user's own token ids, each with its origin."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mergekit_dam.calibration.rows import STANDARD_COLUMNS, Row
from mergekit_dam.errors import CalibrationError

Message = Mapping[str, Any]
RenderChat = Callable[[Sequence[Message], str], str]
"""(messages, origin for errors) -> the chat as text that includes every special token."""


@dataclass(frozen=True, slots=True)
class Document:
    """One calibration document.

    Attributes:
        content: Text, or token ids that are used as they are.
        origin, file: Those of the row (see `Row`).
        templated: Whether a chat template made the text, special tokens included.
    """

    content: str | Sequence[int]
    origin: str
    file: str | None = None
    templated: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether the document has no token ids, or only white space."""
        return not (self.content.strip() if isinstance(self.content, str) else self.content)


def documents_from(
    rows: Iterable[Row], *, column: str | None, render: RenderChat
) -> Iterator[Document]:
    """Turn rows into documents, lazily; empty documents are kept, so that they can be counted.

    A document's value is the one in `column`, otherwise the first of `text`, `messages` and
    `input_ids` that is not null. A string is a text; a list of {role, content} is a chat, which
    `render` turns into text; a list of integers is token ids; null is an empty document.

    Raises:
        CalibrationError: If a row lacks the column, or its value has another type; the message
            names the row and, for a missing column, the existing ones.
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
    # Tables made from several sources have every column in every row, most of them null.
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
    # Parquet fills absent keys with null, which a template would treat as present.
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _describe(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        kinds = sorted({type(item).__name__ for item in value})
        return f"a list of {' and '.join(kinds)}"
    return type(value).__name__


def chat_renderer(tokenizer: PreTrainedTokenizerBase, *, template_path: str | None) -> RenderChat:
    """A function that renders `(messages, origin)` with a chat template.

    The function raises CalibrationError with `origin` if there is no template, or if the
    template refuses the chat.

    Args:
        tokenizer: Tokenizer whose template is used by default.
        template_path: File of another template. It is read at once.

    Raises:
        CalibrationError: If the file cannot be read.
    """
    template = _read(template_path) if template_path is not None else None

    def render(messages: Sequence[Message], origin: str) -> str:
        if not messages:
            return ""
        if template is None and not tokenizer.chat_template:
            raise CalibrationError(
                f"{origin} holds chat messages, but the model's tokenizer has no chat "
                "template: write `:chat_template=FILE.jinja` behind the source, or give `text`"
            )
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages], chat_template=template, tokenize=False
            )
        except Exception as error:  # a template is a program: it may raise anything
            name = template_path or "the model's chat template"
            raise CalibrationError(f"{origin}: {name} refuses this chat: {error}") from error
        return str(text)

    return render


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"the chat template {path} cannot be read: {error}") from error
