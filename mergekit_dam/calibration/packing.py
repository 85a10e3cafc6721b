"""Pieces of documents -> full sequences of token ids, without padding."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from mergekit_dam.calibration.documents import Document
from mergekit_dam.calibration.pieces import Piece
from mergekit_dam.calibration.turns import covered
from mergekit_dam.errors import CalibrationError

_PROBE = "Hello 0"


@dataclass(frozen=True, slots=True)
class Packed:
    """Tokens in full sequences, and counts.

    Attributes:
        tokens: int64 `[sequences, sequence_length]`; fewer sequences than requested if the pieces
            have too few tokens, down to `[0, sequence_length]`.
        tokenised: Number of tokens made; those after the last full sequence are not used.
        documents: Number of documents with at least one token in `tokens`.
        spelled: Number of tokens that were replaced by several others.
        counted: Which tokens count in losses, bool, in the shape of `tokens`: those whose next
            token counts in its document. None if all do.
    """

    tokens: torch.Tensor
    tokenised: int
    documents: int
    spelled: int = 0
    counted: torch.Tensor | None = None


Spelling = Callable[[int], Sequence[int]]
"""Token id -> ids of the tokens that replace it; the id itself if none do."""


def pack(
    pieces: Iterable[Piece],
    *,
    tokenizer: PreTrainedTokenizerBase,
    sequences: int,
    sequence_length: int,
    vocab_size: int,
    spelled: Spelling | None = None,
) -> Packed:
    """Tokenise pieces and pack them end to end into sequences until there are enough.

    Every text begins with the ids of `document_start`, and continues in the next sequence if it
    does not fit. Each piece is tokenised alone, so that the result does not depend on the number
    of pieces that follow.

    Raises:
        CalibrationError: If a token id is not below `vocab_size`.
    """
    needed = sequences * sequence_length
    start = document_start(tokenizer)
    ids: list[int] = []
    counted: list[bool] = []
    cut = 0
    sources: list[tuple[int, int]] = []  # (position of its first token, document)
    for piece in pieces:
        document = piece.content
        sources.append((len(ids), piece.number))
        own, marks = _encode(document, tokenizer, start)
        _check(own, document, tokenizer, vocab_size)
        if spelled is not None:
            parts = [spelled(token) for token in own]
            cut += sum(len(each) > 1 for each in parts)
            own = [part for each in parts for part in each]
            if marks:
                marks = [mark for mark, each in zip(marks, parts, strict=True) for _ in each]
        ids += own
        if marks:  # a token predicts the next one of its own document
            counted += [*marks[1:], False]
        if len(ids) >= needed:  # tested before the next piece, which may have to be read first
            break
    kept = min(needed, len(ids) // sequence_length * sequence_length)
    return Packed(
        tokens=torch.tensor(ids[:kept], dtype=torch.int64).view(-1, sequence_length),
        tokenised=len(ids),
        documents=len({number for position, number in sources if position < kept}),
        spelled=cut,
        counted=torch.tensor(counted[:kept]).view(-1, sequence_length) if counted else None,
    )


def document_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids in front of every document's text.

    They are those that the tokenizer adds by itself; otherwise its bos token; otherwise its eos
    token, as a separator; otherwise none.
    """
    own = _added_in_front(tokenizer)
    if own:
        return own
    for special in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(special, int):
            return [special]
    return []


def _added_in_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    full = _ids(tokenizer, _PROBE, add_special_tokens=True)
    bare = _ids(tokenizer, _PROBE, add_special_tokens=False)
    for count in range(len(full) - len(bare) + 1):
        if full[count : count + len(bare)] == bare:
            # If the probe has no tokens (a closed vocabulary), `full` is only what was added.
            return full[:count] if bare else full[:1]
    return full[:1]


def _encode(
    document: Document, tokenizer: PreTrainedTokenizerBase, start: list[int]
) -> tuple[Sequence[int], list[bool]]:
    """Token ids of a document, and which of them count; of none, if all tokens do."""
    text, spans = document.content, document.counted
    if not isinstance(text, str):
        return text, []
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{document.origin} holds half of a surrogate pair ({error.reason}), which no "
            "tokenizer reads: mend or remove this text"
        ) from error
    encoded = tokenizer(
        text,
        add_special_tokens=not document.templated,
        return_offsets_mapping=spans is not None,
        verbose=False,  # no warning about text longer than the model's context, as it is packed
    )
    ids = list(encoded["input_ids"])
    marks = [] if spans is None else covered(spans, encoded["offset_mapping"], len(text))
    if document.templated:
        return ids, marks
    count = len(start)
    if ids[:count] != start:
        ids = start + ids
        marks = [False] * count + marks if marks else marks
    # A text that was saved with its special tokens has them twice now: drop one copy.
    twice = count and ids[count : 2 * count] == start
    return (ids[count:], marks[count:]) if twice else (ids, marks)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def _check(
    ids: Sequence[int],
    document: Document,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
) -> None:
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        text = tokenizer.convert_ids_to_tokens(wrong) if 0 <= wrong < len(tokenizer) else None
        named = f"token {text!r} (id {wrong})" if text is not None else f"token id {wrong}"
        raise CalibrationError(
            f"{document.origin}: {named} is outside the model's vocabulary of {vocab_size} ids: "
            "remove this text, or give the model the tokenizer that it was trained with"
        )
