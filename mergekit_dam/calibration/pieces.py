"""Documents -> pieces in a seeded order, a bounded amount of text in memory at a time.

1. Documents are read until a *window* of text is full.
2. Every document in it is cut into pieces of a bounded length, so that one huge document
   does not make the whole calibration set.
3. The pieces of the window come out in a seeded order; then the next window is read.

A source that fits in one window, which is the rule, is thereby shuffled as a whole.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mergekit_dam.calibration.documents import Document
from mergekit_dam.calibration.rows import permutation

CHARACTERS_PER_TOKEN = 4  # English, roughly; only lengths in characters are derived from it


@dataclass(slots=True)
class Intake:
    """What `shuffled_pieces` has read so far; it keeps the counts up to date.

    `characters` counts a token id as `CHARACTERS_PER_TOKEN`. `exhausted`: the source has no
    document left. `windows`: how often a window was full, or the source at its end.
    """

    documents: int = 0
    empty: int = 0
    cut: int = 0
    characters: int = 0
    windows: int = 0
    exhausted: bool = False
    files: dict[str, None] = field(default_factory=dict)  # a set in order of reading


@dataclass(frozen=True, slots=True)
class Piece:
    """The part `content[start:stop]` of a document, the `number`-th non-empty one."""

    document: Document
    number: int
    start: int
    stop: int

    @property
    def content(self) -> Document:
        """The piece as a document of its own. One that starts inside a chat begins like a
        plain text, since the template wrote no special token in front of it."""
        whole = self.document
        templated = whole.templated and self.start == 0
        return Document(whole.content[self.start : self.stop], whole.origin, whole.file, templated)


def shuffled_pieces(
    documents: Iterable[Document], *, window: int, piece_tokens: int, seed: int, intake: Intake
) -> Iterator[Piece]:
    """Yield the pieces of all non-empty documents; see the module for the order.

    `window`: characters. `piece_tokens`: greatest length of a piece, exact for token ids,
    `CHARACTERS_PER_TOKEN` times as many characters for text. `intake` is updated.
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
    """Where to cut `text` into pieces of at most `limit` characters; the last is its length.

    A cut falls behind the last newline, else before the last space, in the second half of
    the piece, and only without either inside a word: tokens across a cut are then rare.
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
