"""Rows -> documents: texts or a user's own token ids, each with its origin."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from mergekit_dam.calibration.formats import RowReader
from mergekit_dam.calibration.messages import Chat
from mergekit_dam.calibration.rows import Row

RenderChat = Callable[[Chat, str], tuple[str, bool]]
"""(chat, origin for errors) -> its text, and whether a template wrote all special tokens."""


@dataclass(frozen=True, slots=True)
class Document:
    """One calibration document.

    Attributes:
        content: Text, or token ids that are used as they are.
        origin, file: Those of the row (see `Row`).
        templated: Whether a chat template made the text, special tokens included.
        form: Name of the format that it was read from.
    """

    content: str | Sequence[int]
    origin: str
    file: str | None = None
    templated: bool = False
    form: str = "text"

    @property
    def is_empty(self) -> bool:
        """Whether the document has no token ids, or only white space."""
        return not (self.content.strip() if isinstance(self.content, str) else self.content)


def documents_from(
    rows: Iterable[Row], *, reader: RowReader, render: RenderChat
) -> Iterator[Document]:
    """Turn rows into documents, lazily; empty documents are kept, so that they can be counted.

    Raises:
        CalibrationError: If a row cannot be read; the message names it.
    """
    for row in rows:
        form, content = reader.read(row)
        if isinstance(content, Chat):
            text, templated = render(content, row.origin)
            yield Document(text, row.origin, row.file, templated, form)
        else:
            yield Document(content, row.origin, row.file, form=form)
