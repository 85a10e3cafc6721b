"""A user's own token ids without their padding."""

from collections.abc import Sequence
from typing import Any

from mergekit_dam.calibration.tally import Tally
from mergekit_dam.errors import CalibrationError


def unpadded(
    ids: Sequence[int],
    mask: Any,
    place: str,
    tally: Tally,
    *,
    padding: int | None,
    is_end: bool,
) -> tuple[int, ...]:
    """The token ids that are no padding.

    Args:
        ids: The token ids of a row.
        mask: The row's `attention_mask`, which is 0 for padding; None if it has none. Padding is
            then every `padding` id at the beginning and at the end.
        place: Where the ids stand, for errors.
        tally: Counts, updated in place.
        padding: Token id of padding, if the tokenizer has one.
        is_end: Whether `padding` is also the token that ends a document; the first of those at
            the end is then kept.

    Raises:
        CalibrationError: If the mask is not as long as the ids.
    """
    if mask is not None:
        if not isinstance(mask, (list, tuple)) or len(mask) != len(ids):
            found = f"{len(mask)}" if isinstance(mask, (list, tuple)) else type(mask).__name__
            raise CalibrationError(
                f"{place} has {len(ids)} token ids, but its `attention_mask` has {found}: it must "
                "be a list of the same length"
            )
        kept = tuple(token for token, seen in zip(ids, mask, strict=True) if seen)
    else:
        kept = _stripped(ids, padding, is_end)
    tally.padding += len(ids) - len(kept)
    return kept


def _stripped(ids: Sequence[int], padding: int | None, is_end: bool) -> tuple[int, ...]:
    start, stop = 0, len(ids)
    while start < stop and ids[start] == padding:
        start += 1
    while stop > start and ids[stop - 1] == padding:
        stop -= 1
    if is_end and stop < len(ids) and start < stop:
        stop += 1
    return tuple(ids[start:stop])
