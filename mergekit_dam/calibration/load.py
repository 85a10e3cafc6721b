"""From a source to a calibration set, step by step."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath

from transformers import PreTrainedTokenizerBase

from mergekit_dam.calibration.combining import combined
from mergekit_dam.calibration.documents import Document
from mergekit_dam.calibration.hub import DEFAULT_SPLIT
from mergekit_dam.calibration.judgement import warnings_of
from mergekit_dam.calibration.mixture import Calibration, divided, parse_sources
from mergekit_dam.calibration.overlap import OVERLAP, Sentences, in_both
from mergekit_dam.calibration.packing import Packed, Spelling, pack
from mergekit_dam.calibration.pieces import CHARACTERS_PER_TOKEN, Intake, shuffled_pieces
from mergekit_dam.calibration.reading import Reading, open_source
from mergekit_dam.calibration.sets import (
    KEPT,
    CalibrationSet,
    Provenance,
    WrittenDocument,
    tokens_sha256,
)
from mergekit_dam.calibration.source import CalibrationSource
from mergekit_dam.calibration.tally import Tally
from mergekit_dam.errors import CalibrationError, inside

LOG = logging.getLogger(__name__)

LOCAL_WINDOW = 64 * 2**20  # characters of text in memory at a time
HUB_WINDOW_FACTOR = 4  # downloads are slow: only four times the text that is probably needed
PIECE_SEQUENCES = 2  # documents longer than about two sequences are cut into pieces


Write = Callable[[CalibrationSource, int], Sequence[Sequence[int]]]
"""(source, tokens needed) -> documents that the model itself writes, as token ids."""


def load_calibration(
    value: Calibration,
    *,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    sequence_length: int,
    vocab_size: int,
    seed: int,
    spelled: Spelling | None = None,
    write: Write | None = None,
) -> CalibrationSet:
    """Read, shuffle, tokenise and pack the calibration text of one model.

    1. Parse the value of `calibration:` in the YAML (see `CalibrationSource`).
    2. Read rows lazily and turn them into documents, chats with the model's template.
    3. Cut long documents into pieces of about two sequences, and shuffle the pieces.
    4. Tokenise and pack until there are enough full sequences.

    Equal inputs and seeds give equal tokens, bit for bit. With a Hub dataset, its commit and the
    version of `datasets` must be the same too.

    Args:
        value: The value of `calibration:`, a source or a list of them.
        model: Name of the model, for messages.
        tokenizer: Tokenizer of the model.
        samples: Number of sequences, unless the source has its own; several sources divide it.
        sequence_length: Tokens per sequence.
        vocab_size: Vocabulary size in the model's config.
        seed: Seed of the order of files and pieces.
        spelled: Replaces tokens that the merged model will not have.
        write: Has the model write, if the source is its own text.

    Raises:
        CalibrationError: If anything is wrong with the source, its documents or the token ids, or
            if there are too few tokens.
    """
    with inside(f"calibration of {model}"):
        sources = parse_sources(value)
        sets = [
            _load(
                source,
                model=model,
                tokenizer=tokenizer,
                sequences=sequences,
                sequence_length=sequence_length,
                vocab_size=vocab_size,
                seed=seed,
                spelled=spelled,
                write=write,
            )
            for source, sequences in zip(sources, divided(sources, samples), strict=True)
        ]
        for first, second in itertools.combinations([own.provenance for own in sets], 2):
            share = in_both(first.sentences, second.sentences)
            if share > OVERLAP:
                LOG.warning(
                    "calibration of %s: %.0f %% of the sentences are in both %r and %r; leave one "
                    "of the two out, or its copies will judge what was fitted to the others",
                    *(model, 100 * share, first.source, second.source),
                )
        return sets[0] if len(sets) == 1 else combined(sets)


def _load(
    source: CalibrationSource,
    *,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    sequences: int,
    sequence_length: int,
    vocab_size: int,
    seed: int,
    spelled: Spelling | None,
    write: Write | None,
) -> CalibrationSet:
    written: tuple[WrittenDocument, ...] = ()
    if source.kind == "self":
        written = _written(source, tokenizer, sequences * sequence_length, write)
        reading = Reading(_as_documents(written), Tally(), "")
    else:
        reading = open_source(source, tokenizer=tokenizer, model=model, seed=seed)
    intake, sentences = Intake(), Sentences()
    window = _window(source, needed=sequences * sequence_length)
    pieces = shuffled_pieces(
        reading.documents,
        window=window,
        piece_tokens=PIECE_SEQUENCES * sequence_length,
        seed=seed,
        intake=intake,
    )
    packed = pack(
        sentences.of(pieces),
        tokenizer=tokenizer,
        sequences=sequences,
        sequence_length=sequence_length,
        vocab_size=vocab_size,
        spelled=spelled,
    )
    _require_enough(packed, intake, source, sequences)
    provenance = dataclasses.replace(
        _provenance(source, model, seed, reading, intake, packed),
        cut=tuple(_cuts(packed, intake, reading, window)),
        warnings=tuple(warnings_of(intake, packed.tokens, tokenizer)),
        sentences=sentences.kept(),
        synthetic=bool(written)
        or any(PurePath(file).name.startswith(KEPT) for file in intake.files),
    )
    LOG.info(provenance.summary())
    for warning in provenance.warnings:
        LOG.warning("calibration of %s: %s", model, warning)
    if not intake.exhausted and source.kind != "hub":
        LOG.warning("calibration of %s: %s", model, provenance.cut[0])
    return CalibrationSet(packed.tokens, provenance, written, packed.counted)


def _provenance(
    source: CalibrationSource,
    model: str,
    seed: int,
    reading: Reading,
    intake: Intake,
    packed: Packed,
) -> Provenance:
    hub = source.kind == "hub"
    sequences, length = packed.tokens.shape
    return Provenance(
        model=model,
        source=source.text,
        files=tuple(intake.files),
        dataset=source.location if hub else None,
        revision=reading.revision,
        split=(source.split or DEFAULT_SPLIT) if hub else None,
        seed=seed,
        read_as=reading.read_as(intake),
        documents_read=intake.documents,
        documents_used=packed.documents,
        empty_skipped=intake.empty,
        tokens_available=packed.tokenised,
        tokens_used=packed.tokens.numel(),
        sequences=sequences,
        sequence_length=length,
        cut=(),
        sha256=tokens_sha256(packed.tokens, packed.counted),
        tokens_counted=None if packed.counted is None else int(packed.counted.sum()),
    )


def _window(source: CalibrationSource, *, needed: int) -> int:
    """Characters of text that are shuffled at a time."""
    if source.kind == "hub":
        return min(LOCAL_WINDOW, HUB_WINDOW_FACTOR * CHARACTERS_PER_TOKEN * needed)
    return LOCAL_WINDOW


def _written(
    source: CalibrationSource,
    tokenizer: PreTrainedTokenizerBase,
    needed: int,
    write: Write | None,
) -> tuple[WrittenDocument, ...]:
    """Documents that the model writes."""
    if write is None:
        raise CalibrationError(f"{source.text!r}: no model is at hand that could write text")
    made = [tuple(ids) for ids in write(source, needed)]
    return tuple(WrittenDocument(ids, str(tokenizer.decode(list(ids)))) for ids in made)


def _as_documents(written: Sequence[WrittenDocument]) -> Iterator[Document]:
    """The same as a file that keeps them gives."""
    for number, each in enumerate(written, start=1):
        yield Document(each.input_ids, f"document {number} of the model's own", form="own text")


def _require_enough(
    packed: Packed, intake: Intake, source: CalibrationSource, sequences: int
) -> None:
    full, length = packed.tokens.shape
    if full == sequences:
        return
    if not intake.documents:
        raise CalibrationError(
            f"{source.text!r} holds no text ({intake.empty} empty documents): "
            "name a source with text"
        )
    remedy = "add text"
    if full:
        remedy += f", or ask for fewer sequences: `samples: {full}`, or for this model alone "
        remedy += f"`{source.location}:samples={full}`"
    elif packed.tokenised >= 2 * sequences:
        remedy += f", or set `sequence_length` to {packed.tokenised // sequences} or less"
    raise CalibrationError(
        f"{sequences} sequences of {length} tokens ({sequences * length:,} tokens) are needed, but "
        f"{source.text!r} holds {packed.tokenised:,} tokens in {intake.documents:,} documents, "
        f"which are {full} full sequences: {remedy}"
    )


def _cuts(packed: Packed, intake: Intake, reading: Reading, window: int) -> Iterator[str]:
    if not intake.exhausted:
        yield (
            f"only the first {intake.documents:,} documents ({intake.characters:,} characters) "
            f"were read: text is shuffled {window:,} characters at a time, and these "
            "held enough"
        )
    if intake.cut:
        length = PIECE_SEQUENCES * packed.tokens.shape[1]
        yield (
            f"{intake.cut:,} documents longer than {length * CHARACTERS_PER_TOKEN:,} characters "
            f"(or {length:,} token ids) were cut into pieces, so that none fills the whole set"
        )
    if intake.documents > packed.documents:
        unused = intake.documents - packed.documents
        yield f"{unused:,} of {intake.documents:,} documents read were not needed"
    if packed.tokenised > packed.tokens.numel():
        left = packed.tokenised - packed.tokens.numel()
        yield f"{left:,} tokens after the end of the last sequence were left out"
    if packed.spelled:
        yield (
            f"{packed.spelled:,} tokens that the merged model will not have were cut into others "
            f"(in total, there are then {packed.tokenised:,} tokens)"
        )
    if intake.empty:
        yield f"{intake.empty:,} empty documents were skipped"
    yield from reading.left_out
    yield from reading.tally.sentences()
