"""Documents -> pieces in a seeded order, with a bounded amount of text in memory.

1. Documents are read until a *window* of text is full.
2. Every document is cut into pieces of bounded length, so that one huge document does not fill
   the whole calibration set.
3. The pieces of the window are yielded in a seeded order; then the next window is read.

Most sources fit into one window and are therefore shuffled as a whole.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from mergekit_dam.calibration.documents import Document
from mergekit_dam.calibration.rows import permutation
from mergekit_dam.calibration.turns import Span

CHARACTERS_PER_TOKEN = 4  # roughly, in English; only limits in characters are derived from it


@dataclass(slots=True)
class Intake:
    """Counts of the text that `shuffled_pieces` has read so far, and keeps up to date.

    Attributes:
        documents: Number of non-empty documents; `empty` counts the others.
        copies: Number of documents whose content another one had before.
        cut: Number of documents that were cut into several pieces.
        characters: Characters of all documents; a token id counts as `CHARACTERS_PER_TOKEN`.
        windows: Number of windows, the last one included, which may not have been full.
        exhausted: Whether the source has no document left.
        files: Local files that were read, as keys.
        seen: Hashes of the documents.
        forms: Number of documents by the name of their format, and whether a template made them.
    """

    documents: int = 0
    empty: int = 0
    copies: int = 0
    cut: int = 0
    characters: int = 0
    windows: int = 0
    exhausted: bool = False
    files: dict[str, None] = field(default_factory=dict)  # an ordered set
    forms: Counter[tuple[str, bool]] = field(default_factory=Counter)
    seen: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Piece:
    """The part `content[start:stop]` of a document, which is the `number`-th non-empty one."""

    document: Document
    number: int
    start: int
    stop: int

    @property
    def content(self) -> Document:
        """The piece as a document of its own.

        A piece from the middle of a chat begins like a plain text, because the template put no
        special token in front of it.
        """
        whole = self.document
        templated = whole.templated and self.start == 0
        content = whole.content[self.start : self.stop]
        counted = None if whole.counted is None else tuple(self._moved(whole.counted))
        return replace(whole, content=content, templated=templated, counted=counted)

    def _moved(self, spans: Iterable[Span]) -> Iterator[Span]:
        """The parts of spans of the document that are in the piece, from where that begins."""
        for start, stop in spans:
            first, last = max(start, self.start), min(stop, self.stop)
            if first < last:
                yield first - self.start, last - self.start


def shuffled_pieces(
    documents: Iterable[Document], *, window: int, piece_tokens: int, seed: int, intake: Intake
) -> Iterator[Piece]:
    """Yield the pieces of all non-empty documents, in the order that the module describes.

    Args:
        documents: Documents, which are read lazily.
        window: Size of a window in characters.
        piece_tokens: Largest length of a piece: this many token ids, or `CHARACTERS_PER_TOKEN`
            times as many characters.
        seed: Seed of the order.
        intake: Counts, updated in place.
    """
    waiting: list[Piece] = []
    size = 0
    for document in documents:
        if document.file is not None:
            intake.files.setdefault(document.file)
        if document.is_empty:
            intake.empty += 1
            continue
        pieces = _pieces(document, intake.documents, piece_tokens)
        intake.documents += 1
        intake.copies += (own := hash(document.content)) in intake.seen
        intake.seen.add(own)
        intake.forms[document.form, document.templated] += 1
        intake.cut += len(pieces) > 1
        size += _characters(document)
        waiting += pieces
        if size >= window:
            yield from _drain(waiting, size, seed, intake)
            waiting, size = [], 0
    intake.exhausted = True
    yield from _drain(waiting, size, seed, intake)


def _drain(waiting: list[Piece], size: int, seed: int, intake: Intake) -> Iterator[Piece]:
    intake.characters += size
    intake.windows += 1
    for index in permutation(len(waiting), seed=seed):
        yield waiting[index]


def _characters(document: Document) -> int:
    per_item = 1 if isinstance(document.content, str) else CHARACTERS_PER_TOKEN
    return per_item * len(document.content)


def _pieces(document: Document, number: int, tokens: int) -> list[Piece]:
    content = document.content
    if isinstance(content, str):
        stops = text_stops(content, tokens * CHARACTERS_PER_TOKEN)
    else:
        stops = [*range(tokens, len(content), tokens), len(content)]
    starts = [0, *stops[:-1]]
    return [Piece(document, number, *span) for span in zip(starts, stops, strict=True)]


def text_stops(text: str, limit: int) -> list[int]:
    """Ends of the pieces of `text`, each of at most `limit` characters.

    A piece ends after the last newline in its second half, otherwise before the last space there,
    otherwise inside a word. Few tokens are therefore cut.
    """
    stops: list[int] = []
    start = 0
    while len(text) - start > limit:
        middle, end = start + limit // 2, start + limit
        newline = text.rfind("\n", middle, end)
        space = text.rfind(" ", middle + 1, end)
        start = newline + 1 if newline >= 0 else space if space >= 0 else end
        stops.append(start)
    return [*stops, len(text)]
