"""The demo's text: three domains, split by document; it needs nothing but a Python installation.

`python` has excerpts of the standard library's sources, `arithmetic` generated word problems, and
`records` generated records of invented persons. `english` has docstrings of the standard library;
only the base model is trained on this general text.
"""

import ast
import random
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mergekit_dam.demo.arithmetic import word_problem
from mergekit_dam.demo.records import person_record
from mergekit_dam.errors import DamError

DOMAINS = ("python", "arithmetic", "records")

# Tests and bundled packages differ most between installations; `encodings` has only tables.
_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}
)
_EXCERPT_CHARACTERS = 1200
_SHORTEST_EXCERPT = 200
_SHORTEST_DOCSTRING = 120


@dataclass(frozen=True)
class Split:
    """Documents of one domain; no document and no source file is in two parts."""

    train: tuple[str, ...]
    calibration: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """The text of a demo: a split for each of `DOMAINS`, and general text for the base."""

    domains: dict[str, Split]
    english: tuple[str, ...]


def make_corpus(*, train: int, english: int, held_out: int, seed: int) -> Corpus:
    """Make the text of a demo; the same seed on the same machine gives the same text.

    Args:
        train: Smallest number of characters of training text per domain, if there are so many.
        english: Smallest number of characters of general text, likewise.
        held_out: Smallest number of characters of calibration text per domain, and of test text.
        seed: Seed of the choice of excerpts and of the generated text.
    """
    python, docstrings = _standard_library(
        train=train, english=english, held_out=held_out, seed=seed
    )
    return Corpus(
        domains={
            "python": python,
            "arithmetic": _generated(word_problem, train, held_out, f"{seed}/arithmetic"),
            "records": _generated(person_record, train, held_out, f"{seed}/records"),
        },
        english=docstrings,
    )


def _generated(make: Callable[[random.Random], str], train: int, held_out: int, seed: str) -> Split:
    documents = _unique(make, random.Random(seed))
    return Split(
        test=_take(documents, held_out),
        calibration=_take(documents, held_out),
        train=_take(documents, train),
    )


def _unique(make: Callable[[random.Random], str], rng: random.Random) -> Iterator[str]:
    """Yield documents without end, each only once."""
    seen: set[str] = set()
    while True:
        document = make(rng)
        if document not in seen:
            seen.add(document)
            yield document


def _take(documents: Iterable[str], characters: int) -> tuple[str, ...]:
    """Take the next documents, until they have this many characters together."""
    taken: list[str] = []
    total = 0
    for document in documents:
        taken.append(document)
        total += len(document)
        if total >= characters:
            break
    return tuple(taken)


def _standard_library(
    *, train: int, english: int, held_out: int, seed: int
) -> tuple[Split, tuple[str, ...]]:
    """The python split and the docstrings. Files are split first, then cut into excerpts.

    Held-out parts take one excerpt per file, so that they are as diverse as their size allows.
    """
    rng = random.Random(f"{seed}/python")
    sources = _sources(rng)
    one_each = (excerpts[rng.randrange(len(excerpts))] for excerpts in map(_excerpts, sources))
    test = _take(one_each, held_out)
    calibration = _take(one_each, held_out)
    excerpts: list[str] = []
    docstrings: list[str] = []
    needed = {"excerpts": train, "docstrings": english}
    for source in sources:
        if needed["excerpts"] > 0:
            new = _excerpts(source)
            excerpts += new
            needed["excerpts"] -= sum(map(len, new))
        new = _docstrings(source)
        docstrings += new
        needed["docstrings"] -= sum(map(len, new))
        if max(needed.values()) <= 0:
            break
    rng.shuffle(excerpts)
    rng.shuffle(docstrings)
    return Split(train=tuple(excerpts), calibration=calibration, test=test), tuple(docstrings)


def _sources(rng: random.Random) -> Iterator[str]:
    """Yield the standard library's source files in random order, read one by one."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(
        path for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts)
    )
    if len(paths) < 100:
        raise DamError(
            f"the demo trains on the sources of Python's standard library, at least 100 files; "
            f"{root} has {len(paths)}: use a Python that was installed with its sources"
        )
    rng.shuffle(paths)
    for path in paths:
        source = path.read_text(encoding="utf-8", errors="ignore")
        if len(source) >= _SHORTEST_EXCERPT:
            yield source


def _excerpts(source: str) -> list[str]:
    """Cut a source file at line ends into pieces of about `_EXCERPT_CHARACTERS`."""
    pieces: list[str] = []
    piece = ""
    for line in source.splitlines(keepends=True):
        piece += line
        if len(piece) >= _EXCERPT_CHARACTERS:
            pieces.append(piece)
            piece = ""
    if len(piece) >= _SHORTEST_EXCERPT or not pieces:
        pieces.append(piece)
    return pieces


def _docstrings(source: str) -> list[str]:
    """The longer docstrings of a source file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some sources have invalid escapes
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return []
    nodes = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    )
    found = (ast.get_docstring(node) or "" for node in nodes)
    return [text for text in found if len(text) >= _SHORTEST_DOCSTRING]
