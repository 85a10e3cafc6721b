"""What speaks against a text, before it is used: one sentence each, with the remedy."""

import math
import re
from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerBase

from mergekit_dam.calibration.pieces import Intake
from mergekit_dam.calibration.sets import CalibrationSet
from mergekit_dam.errors import CalibrationError

COPIES = 0.1
"""Share of copies among the documents above which there is a warning."""

BROKEN = 0.2
"""Share of tokens that are parts of characters above which there is a warning."""

UNKNOWN = 0.01
"""Share of unknown tokens above which there is a warning."""

BLIND = 0.9
"""Loss of a model on its text above which there is a warning, as a part of that of a guess."""

MISFIT = 0.05
"""Nats per token by which the start may predict a model's text better than the model itself."""

_FEWEST = 10  # documents: fewer copies are no pattern
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def warnings_of(
    intake: Intake, tokens: torch.Tensor, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """What speaks against a text.

    Args:
        intake: Counts of the documents that were read.
        tokens: int64 `[sequences, sequence_length]`, the model's own ids.
        tokenizer: The model's tokenizer.
    """
    if intake.documents >= _FEWEST and intake.copies > COPIES * intake.documents:
        yield (
            f"{intake.copies:,} of {intake.documents:,} documents read are copies of others, and "
            "would count several times: remove the copies"
        )
    broken, unknown = _shares(tokens, tokenizer)
    if broken > BROKEN:
        yield (
            f"{broken:.0%} of the tokens are parts of characters: the tokenizer breaks this script "
            "into bytes, so the model hardly knows it, and the sequences hold little text. Is it "
            "the right text for this model? If so, raise `sequence_length`"
        )
    if unknown > UNKNOWN:
        yield (
            f"{unknown:.0%} of the tokens are the unknown token: the tokenizer lacks what this "
            "text is made of. Is it the right text, and the right tokenizer, for this model?"
        )


def misfit_of(own: float, start: float, vocabulary: int) -> str | None:
    """What speaks against a text once its model has read it.

    Args:
        own: The model's loss on it, in nats per token.
        start: The loss of what the merge starts from, usually the average of the models.
        vocabulary: Number of the model's tokens.
    """
    guess = math.log(vocabulary)
    if own > BLIND * guess:
        return (
            f"the model's own loss on this text is {own:.3g} nats per token, and that of a guess "
            f"among its {vocabulary:,} tokens is {guess:.3g}: the model does not know such text. "
            "Is it the right text, and the right tokenizer, for this model?"
        )
    if own > start + MISFIT:
        return (
            f"the model's own loss on this text is {own:.3g} nats per token, and that of the "
            f"model that the merge starts from is {start:.3g}: others know such text better, and "
            "the merge unlearns it for this model. Is it the text of another model? If not, give "
            "text that this model is good at"
        )
    return None


def require_counted(own: CalibrationSet, held_out: int, model: str) -> None:
    """Refuse a text of which no token counts, in the fit or among what judges it.

    Args:
        own: The text.
        held_out: Number of held-out sequences, the last ones.
        model: Name of the model, for the message.

    Raises:
        CalibrationError: No token counts.
    """
    if own.counted is None:
        return
    judging, every = own.number_counted(held_out), own.number_counted(len(own.tokens))
    if every == judging or (held_out and not judging):
        split = "the held-out sequences" if every else "the text"
        split = "the sequences of the fit" if every and every == judging else split
        raise CalibrationError(
            f"calibration of {model}: `loss_on=assistant`, but no token of {split} is an "
            "assistant's: give chats with shorter messages of the user, raise `samples`, or remove "
            "`loss_on`"
        )


def _shares(tokens: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> tuple[float, float]:
    """Shares of tokens that are parts of characters, and of unknown ones."""
    ids, counts = torch.unique(tokens, return_counts=True)
    broken = unknown = 0
    for token, count in zip(ids.tolist(), counts.tolist(), strict=True):
        if token == tokenizer.unk_token_id:
            unknown += count
        elif _is_part(token, tokenizer):
            broken += count
    return broken / tokens.numel(), unknown / tokens.numel()


def _is_part(token: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a token is some bytes of a character (and no ASCII character, which is one byte)."""
    name = tokenizer.convert_ids_to_tokens(token)
    if isinstance(name, str) and _BYTE.fullmatch(name):
        return int(name[3:5], 16) >= 128
    return "\ufffd" in str(tokenizer.decode([token]))
