"""Texts split by document: calibration to fit on, validation to choose by, test to report.

Documents are compared with white space folded, and repeated ones dropped. A file that has to serve
for several parts is sorted by the SHA-256 of each document's text and cut at the shares, so that
the parts depend on nothing but the texts, not on their order. Parts that come from files of their
own may overlap: what calibration or validation shares with test is left out of the former.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_dam.calibration.documents import Document, documents_from
from mergekit_dam.calibration.files import local_rows
from mergekit_dam.calibration.folders import find_files
from mergekit_dam.calibration.formats import RowReader, columns_of
from mergekit_dam.calibration.messages import Chat
from mergekit_dam.calibration.source import CalibrationSource
from mergekit_dam.calibration.tally import Tally
from mergekit_dam.errors import DamError

PARTS = ("calibration", "validation", "test")
_WORTH_FINDING = 40  # characters; a shorter text may stand inside another by chance

Documents = tuple[str, ...]
Parts = dict[str, Documents]
"""The documents of one domain, by the names in `PARTS`."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Files of one domain's texts, in the forms that the parameter `calibration` takes.

    Attributes:
        text: a file for every part that has no file of its own.
        calibration: a file to calibrate on; without `validation`, also to validate on.
    """

    text: str | None = None
    calibration: str | None = None
    validation: str | None = None
    test: str | None = None


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How a file's documents are divided among the parts that it serves for, by ratio."""

    calibration: float = 0.5
    validation: float = 0.2
    test: float = 0.3

    def of(self, parts: Sequence[str]) -> list[float]:
        """The shares of these parts, which sum to one."""
        shares = [float(getattr(self, part)) for part in parts]
        return [share / sum(shares) for share in shares]


@dataclass(frozen=True)
class PartSummary:
    """Size of a part of a domain, and how many documents were left out to keep test unseen."""

    domain: str
    part: str
    documents: int
    tokens: int
    left_out: int


def make_parts(sources: Mapping[str, Sources], shares: Shares) -> tuple[dict[str, Parts], Parts]:
    """Read and split every domain, and remove from calibration and validation what test holds.

    Returns:
        The parts of each domain, and for each domain name.part the documents left out.

    Raises:
        DamError: if a text is missing, cannot be read, or is too short to split.
    """
    raw = {domain: _parts_of(domain, own, shares) for domain, own in sources.items()}
    kept: dict[str, Parts] = {domain: {} for domain in raw}
    left_out: Parts = {}
    unseen: list[str] = []
    for part in reversed(PARTS):  # test stays whole; validation gives way to it, and so on
        for domain, parts in raw.items():
            shared = frozenset(overlap(unseen, parts[part]))
            kept[domain][part] = tuple(text for text in parts[part] if text not in shared)
            left_out[f"{domain}.{part}"] = tuple(text for text in parts[part] if text in shared)
            if not kept[domain][part]:
                raise DamError(f"no {part} text of {domain} is left: all of it is in later parts")
        unseen += [text for parts in kept.values() for text in parts[part]]
    return {domain: {part: own[part] for part in PARTS} for domain, own in kept.items()}, left_out


def split(documents: Sequence[str], shares: Sequence[float]) -> list[Documents]:
    """Cut documents, sorted by the hash of their text, into parts of the given shares.

    Every part gets one document at least.

    Raises:
        DamError: if there are fewer documents than parts.
    """
    if len(documents) < len(shares):
        raise DamError(
            f"{len(documents)} documents cannot be split into {len(shares)} parts: give rows (a "
            f".txt file is one document), or a file for each part"
        )
    ordered = sorted(documents, key=lambda text: hashlib.sha256(_folded(text).encode()).digest())
    parts = []
    start = 0
    for index in range(len(shares)):
        later = len(shares) - index - 1
        end = len(ordered) if not later else round(sum(shares[: index + 1]) * len(ordered))
        end = min(max(end, start + 1), len(ordered) - later)
        parts.append(tuple(ordered[start:end]))
        start = end
    return parts


def overlap(unseen: Iterable[str], documents: Sequence[str]) -> list[str]:
    """Those documents that are one of `unseen`, hold one, or stand inside one."""
    hidden = [_folded(text) for text in unseen]
    if not hidden:
        return []
    equal = frozenset(hidden)
    long = [text for text in hidden if len(text) >= _WORTH_FINDING]
    # No folded text holds a line end, so nothing is found across two documents.
    all_hidden = "\n".join(hidden)
    all_open = "\n".join(map(_folded, documents))
    held = [text for text in long if text in all_open]

    def shares_text(document: str) -> bool:
        text = _folded(document)
        inside = len(text) >= _WORTH_FINDING and text in all_hidden
        return text in equal or inside or any(other in text for other in held)

    return [document for document in documents if shares_text(document)]


def write_parts(parts: Mapping[str, Parts], folder: Path) -> None:
    """Write every part as `DOMAIN.PART.jsonl`, one `text` per line."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain, own in parts.items():
        for part, documents in own.items():
            lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
            part_path(folder, domain, part).write_text(lines, encoding="utf-8")


def part_path(folder: Path, domain: str, part: str) -> Path:
    """Where `write_parts` puts a part."""
    return folder / f"{domain}.{part}.jsonl"


def summarise(
    parts: Mapping[str, Parts], left_out: Parts, count_tokens: Callable[[str], int]
) -> tuple[PartSummary, ...]:
    """Count the documents and tokens of every part."""
    return tuple(
        PartSummary(
            domain=domain,
            part=part,
            documents=len(own[part]),
            tokens=sum(map(count_tokens, own[part])),
            left_out=len(left_out[f"{domain}.{part}"]),
        )
        for domain, own in parts.items()
        for part in PARTS
    )


def statement(summaries: Sequence[PartSummary]) -> list[str]:
    """Sentences that describe the split: one line per domain, and one for all."""
    lines = []
    for domain in dict.fromkeys(summary.domain for summary in summaries):
        counts = [
            f"{own.part} {own.documents:,} documents ({own.tokens:,} tokens"
            + (f"; {own.left_out:,} left out)" if own.left_out else ")")
            for own in summaries
            if own.domain == domain
        ]
        lines.append(f"{domain}: " + ", ".join(counts))
    lines.append(
        "Merges see calibration text, grids are decided on validation, losses are those of test. "
        "No test document, of any domain, is found in calibration or validation text, whole or as "
        "a part (white space folded): "
        f"{sum(summary.left_out for summary in summaries):,} documents were left out for it."
    )
    return lines


def _parts_of(domain: str, sources: Sources, shares: Shares) -> Parts:
    """The parts of a domain as its files give them."""
    files: dict[str, list[str]] = {}
    for part in PARTS:
        file = getattr(sources, part) or sources.text
        if file is None and part == "validation":
            file = sources.calibration
        if file is None:
            raise DamError(f"{domain} has no {part} text: pass --text, or --{part}, {domain}=FILE")
        files.setdefault(file, []).append(part)
    found: Parts = {}
    for file, parts in files.items():
        try:
            documents = read_documents(file)
            found |= zip(parts, split(documents, shares.of(parts)), strict=True)
        except DamError as error:
            raise DamError(f"{domain}: {file}: {error}") from error
    return found


def read_documents(source: str) -> list[str]:
    """The texts of a local file or folder, each once, without empty ones.

    Raises:
        DamError: if it is no local text, or a row holds no string.
    """
    parsed = CalibrationSource.parse(source)
    if parsed.kind == "hub":
        raise DamError("is not there; the benchmark reads local files")
    rows = local_rows(find_files(parsed).files, columns=columns_of(parsed.column), seed=0)
    reader = RowReader(form=parsed.format, column=parsed.column, tally=Tally())
    documents = documents_from(rows, reader=reader, render=_no_chats)
    return list({_folded(text): text for text in _texts(documents) if text.strip()}.values())


def _texts(documents: Iterable[Document]) -> Iterator[str]:
    for document in documents:
        if not isinstance(document.content, str):
            raise DamError(f"{document.origin} holds token ids: give text")
        yield document.content


def _no_chats(chat: Chat, origin: str) -> tuple[str, bool]:
    raise DamError(f"{origin} holds chat messages: render them to `text` first")


def _folded(text: str) -> str:
    return " ".join(text.split())
