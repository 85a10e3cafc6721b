"""Rows -> documents: texts or a user's own token ids, each with its origin."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from mergekit_dam.calibration.formats import Content, RowReader
from mergekit_dam.calibration.messages import Answered, Chat
from mergekit_dam.calibration.rows import Row
from mergekit_dam.calibration.turns import Span
from mergekit_dam.errors import CalibrationError

RenderChat = Callable[[Chat, str], tuple[str, bool]]
"""(chat, origin for errors) -> its text, and whether a template wrote all special tokens."""

FindAnswers = Callable[[Chat, str, str], tuple[Span, ...]]
"""(chat, its text from a template, origin for errors) -> where the assistant's turns are."""


@dataclass(frozen=True, slots=True)
class Document:
    """One calibration document.

    Attributes:
        content: Text, or token ids that are used as they are.
        origin, file: Those of the row (see `Row`).
        templated: Whether a chat template made the text, special tokens included.
        form: Name of the format that it was read from.
        counted: Parts of the text whose tokens count in losses; None if all tokens do.
    """

    content: str | Sequence[int]
    origin: str
    file: str | None = None
    templated: bool = False
    form: str = "text"
    counted: tuple[Span, ...] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the document has no token ids, or only white space."""
        return not (self.content.strip() if isinstance(self.content, str) else self.content)


def documents_from(
    rows: Iterable[Row],
    *,
    reader: RowReader,
    render: RenderChat,
    answers: FindAnswers | None = None,
) -> Iterator[Document]:
    """Turn rows into documents, lazily; empty documents are kept, so that they can be counted.

    Args:
        rows: The rows.
        reader: Reads them.
        render: Writes chats.
        answers: Finds answers, if their tokens alone are to count.

    Raises:
        CalibrationError: If a row cannot be read, or if it has no answer and answers alone count;
            the message names it.
    """
    for row in rows:
        form, content = reader.read(row)
        document = _document(content, row, form, render)
        if answers is not None and not document.is_empty:
            document = replace(document, counted=_answers(content, document, answers))
        yield document


def _document(content: Content, row: Row, form: str, render: RenderChat) -> Document:
    templated = False
    if isinstance(content, Chat):
        content, templated = render(content, row.origin)
    elif isinstance(content, Answered):
        content = content.text
    return Document(content, row.origin, row.file, templated, form)


def _answers(content: Content, document: Document, answers: FindAnswers) -> tuple[Span, ...]:
    """Where in a document the answers are."""
    if isinstance(content, Chat):
        if document.templated:
            assert isinstance(document.content, str)
            return answers(content, document.content, document.origin)
        content = content.plain or ""
    if isinstance(content, Answered):
        return ((content.start, len(content.text)),)
    raise CalibrationError(
        f"{document.origin} was read as {document.form}, which does not say what an assistant "
        "wrote: remove `loss_on=assistant`, or give chats, or prompts with completions"
    )
