"""Pieces of documents -> full sequences of token ids, without padding."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from mergekit_dam.calibration.documents import Document
from mergekit_dam.calibration.pieces import Piece
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
    """

    tokens: torch.Tensor
    tokenised: int
    documents: int
    spelled: int = 0


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
    cut = 0
    sources: list[tuple[int, int]] = []  # (position of its first token, document)
    for piece in pieces:
        document = piece.content
        sources.append((len(ids), piece.number))
        own = _checked(_encode(document, tokenizer, start), document, tokenizer, vocab_size)
        if spelled is not None:
            cut += sum(len(spelled(token)) > 1 for token in own)
            own = [piece for token in own for piece in spelled(token)]
        ids += own
        if len(ids) >= needed:  # tested before the next piece, which may have to be read first
            break
    kept = min(needed, len(ids) // sequence_length * sequence_length)
    return Packed(
        tokens=torch.tensor(ids[:kept], dtype=torch.int64).view(-1, sequence_length),
        tokenised=len(ids),
        documents=len({number for position, number in sources if position < kept}),
        spelled=cut,
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
) -> Sequence[int]:
    if not isinstance(document.content, str):
        return document.content
    try:
        document.content.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{document.origin} holds half of a surrogate pair ({error.reason}), which no "
            "tokenizer reads: mend or remove this text"
        ) from error
    if document.templated:
        return _ids(tokenizer, document.content, add_special_tokens=False)
    ids = _ids(tokenizer, document.content, add_special_tokens=True)
    count = len(start)
    if ids[:count] != start:
        ids = start + ids
    # A text that was saved with its special tokens has them twice now: drop one copy.
    return ids[count:] if count and ids[count : 2 * count] == start else ids


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool) -> list[int]:
    # verbose=False: no warning about text longer than the model's context, as it is packed.
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
    return list(encoded["input_ids"])


def _checked(
    ids: Sequence[int],
    document: Document,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
) -> Sequence[int]:
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        text = tokenizer.convert_ids_to_tokens(wrong) if 0 <= wrong < len(tokenizer) else None
        named = f"token {text!r} (id {wrong})" if text is not None else f"token id {wrong}"
        raise CalibrationError(
            f"{document.origin}: {named} is outside the model's vocabulary of {vocab_size} ids: "
            "remove this text, or give the model the tokenizer that it was trained with"
        )
    return ids
