"""The columns of a row -> a text, token ids or a chat, by the format that the columns tell."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from mergekit_dam.calibration.messages import (
    Answered,
    Chat,
    is_chat,
    is_sharegpt,
    messages_in,
    parsed,
    tools_in,
)
from mergekit_dam.calibration.pairs import chosen_answer, instruction, prompt_and_completion
from mergekit_dam.calibration.rows import Row
from mergekit_dam.calibration.tally import Tally
from mergekit_dam.calibration.tokens import unpadded
from mergekit_dam.errors import CalibrationError

Content = str | tuple[int, ...] | Answered | Chat
Columns = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Format:
    """A way in which rows hold text.

    Attributes:
        title: Its name in the log.
        needed: Names of the columns that it needs; of those in one tuple, one.
        optional: Names of the columns that it also reads.
        read: (columns, place for errors, counts) -> content. None: the value of the first of
            `needed` tells by its type what it is.
    """

    title: str
    needed: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()
    read: Callable[[Columns, str, Tally], Content] | None = None

    def has(self, columns: Columns, *, filled: bool) -> bool:
        """Whether a row has the needed columns (and, with `filled`, none of them is null)."""
        return all(
            any(name in columns and (columns[name] is not None or not filled) for name in names)
            for names in self.needed
        )


_CHATS = ("messages", "conversations", "conversation")
_TOOLS = ("tools", "functions")
_ANSWERS = ("output", "response")
_PROMPTS = ("prompt", "question", *_CHATS, "instruction", "input", "system")

FORMATS = {
    "preference": Format(
        "preference pairs (the chosen answer)",
        (("chosen",), ("rejected",)),
        (*_PROMPTS, *_TOOLS),
        chosen_answer,
    ),
    "text": Format("text", (("text",),)),
    "messages": Format("chat messages", (_CHATS,), (*_TOOLS, "system")),
    "sharegpt": Format("ShareGPT", ((*_CHATS[1:], "messages"),), (*_TOOLS, "system")),
    "input_ids": Format("token ids", (("input_ids",),), ("attention_mask",)),
    "alpaca": Format(
        "Alpaca",
        (("instruction",), _ANSWERS),
        ("input", "context", "system", "history"),
        instruction,
    ),
    "completion": Format(
        "prompt and completion",
        (("prompt",), ("completion", "response")),
        (*_TOOLS, "label"),
        prompt_and_completion,
    ),
}
"""The formats by the value of `:format=`, in the order in which a row is tried."""


def is_row(columns: Columns) -> bool:
    """Whether an object is a row of a known format."""
    return any(form.has(columns, filled=False) for form in FORMATS.values())


def columns_of(column: str | None) -> tuple[str, ...]:
    """Names of the columns that may be needed, if `column` is the one that the user names."""
    if column is not None:
        return column, *_TOOLS, "system", _mask_of(column)
    known = (
        name
        for form in FORMATS.values()
        for names in (*form.needed, form.optional)
        for name in names
    )
    return tuple(dict.fromkeys(known))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReader:
    """Reads rows of one source.

    Attributes:
        form: Key of `FORMATS`; None to recognise the format of each row by its columns.
        column: Column that has the content, whatever the format.
        padding: Token id of padding, if the tokenizer has one.
        is_end: Whether that token also ends documents, so that one of them is no padding.
        tally: Counts, updated in place.
    """

    form: str | None = None
    column: str | None = None
    padding: int | None = None
    is_end: bool = False
    tally: Tally

    def read(self, row: Row) -> tuple[str, Content]:
        """The name of a row's format, for the log, and the row's content.

        Null is an empty text.

        Raises:
            CalibrationError: If the row lacks the columns, or if they have another type; the
                message names the row, and for missing columns the existing ones.
        """
        if isinstance(row.value, str):
            return self._bare(row.value, row.origin)
        if self.column is not None:
            self._require_column(self.column, row.value, row.origin)
            return self._typed(self.column, row.value, row.origin)
        form = self._format_of(row.value, row.origin)
        if form.read is not None:
            return form.title, form.read(row.value, row.origin, self.tally)
        present = [name for name in form.needed[0] if name in row.value]
        filled = [name for name in present if row.value[name] is not None]
        return self._typed((filled or present)[0], row.value, row.origin)

    def _bare(self, value: str, origin: str) -> tuple[str, Content]:
        if self.column is not None:
            raise CalibrationError(
                f"{origin} is a bare string, which has no column {self.column!r}: remove `column`"
            )
        if self.form not in (None, "text"):
            raise CalibrationError(
                f"{origin} is a bare string, which is no {FORMATS[self.form].title}: remove "
                "`format`"
            )
        return FORMATS["text"].title, value

    def _require_column(self, column: str, columns: Columns, origin: str) -> None:
        if column in columns:
            return
        close = get_close_matches(column, list(columns), n=1)
        remedy = f"did you mean `column={close[0]}`?" if close else "name one of these"
        raise CalibrationError(
            f"{origin} has no column {column!r}; its columns are {_names(columns)}: {remedy}"
        )

    def _format_of(self, columns: Columns, origin: str) -> Format:
        forms = [FORMATS[self.form]] if self.form is not None else list(FORMATS.values())
        # Tables made from several sources have every column in every row, most of them null.
        for filled in (True, False):
            for form in forms:
                if form.has(columns, filled=filled):
                    return form
        if self.form is not None:
            needed = " and ".join(" or ".join(map(repr, n)) for n in forms[0].needed)
            raise CalibrationError(
                f"{origin} is no {forms[0].title} (columns {needed}); its columns are "
                f"{_names(columns)}: remove `format`, or write `:column=NAME`"
            )
        known = "; ".join(
            ", ".join("/".join(names) for names in form.needed) for form in FORMATS.values()
        )
        raise CalibrationError(
            f"{origin} has none of the columns 'text', 'messages', 'conversations', 'input_ids', "
            f"nor those of another known format ({known}); its columns are {_names(columns)}: "
            "write `:column=NAME` behind the source, with the column that has the whole text, or "
            "rename the columns"
        )

    def _typed(self, name: str, columns: Columns, origin: str) -> tuple[str, Content]:
        """The content of one column, by the type of its value."""
        value = columns[name]
        if value is None:
            return FORMATS["text"].title, ""
        if isinstance(value, str):
            held = None if self.form == "text" else parsed(value)
            is_ids = name.startswith("input_ids") and _is_ids(held)
            if not (is_chat(held) or is_ids):
                return self._text(name, value, origin)
            value = held
        if isinstance(value, (list, tuple)):
            if _is_ids(value) and self.form in (None, "input_ids"):
                mask = columns.get(_mask_of(name))
                place = f"{origin}: {name!r}"
                return FORMATS["input_ids"].title, unpadded(
                    value, mask, place, self.tally, padding=self.padding, is_end=self.is_end
                )
            if all(isinstance(item, Mapping) for item in value) and self.form in _READ_AS_CHAT:
                return self._chat(name, value, columns, origin)
        raise CalibrationError(
            f"{origin}: {name!r} must be a string, a list of {{role, content}} messages or a "
            f"list of token ids; got {_describe(value)}"
            + (f", which is no {FORMATS[self.form].title}" if self.form else "")
        )

    def _text(self, name: str, value: str, origin: str) -> tuple[str, Content]:
        is_broken = (name in _CHATS and value.lstrip()[:2] == "[{") or name == "input_ids"
        if self.form in (None, "text") and not is_broken:
            return FORMATS["text"].title, value
        raise CalibrationError(
            f"{origin}: {name!r} is a string that holds no messages or token ids that can be "
            "read: store them as a list, or as JSON; if it is plain text, write "
            f"`:format=text:column={name}`"
        )

    def _chat(
        self, name: str, value: Sequence[Any], columns: Columns, origin: str
    ) -> tuple[str, Content]:
        messages = messages_in(value, f"{origin}: {name!r}", self.tally)
        system = columns.get("system")
        if isinstance(system, str) and system and messages and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": system}, *messages)
        tools = next((columns[key] for key in _TOOLS if columns.get(key)), None)
        title = FORMATS["sharegpt" if is_sharegpt(value) else "messages"].title
        return title, Chat(messages, tools_in(tools, f"{origin}: `tools`"))


_READ_AS_CHAT = (None, "messages", "sharegpt")


def _is_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(item, int) and not isinstance(item, bool) for item in value
    )


def _mask_of(column: str) -> str:
    """The column that says which token ids of a column are no padding."""
    if "input_ids" in column:
        return column.replace("input_ids", "attention_mask")
    return "attention_mask"


def _names(columns: Columns) -> str:
    return ", ".join(map(repr, columns)) or "none"


def _describe(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        kinds = sorted({type(item).__name__ for item in value})
        return f"a list of {' and '.join(kinds)}"
    return type(value).__name__
