"""From a model's ids to the merged model's ids, if that has a vocabulary of its own."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from mergekit.common import ModelReference
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mergekit_dam.errors import CalibrationError, listed
from mergekit_dam.vocabulary.merged import LOST, Vocabulary

_BYTE = re.compile("<0x([0-9A-F]{2})>")
"""Token for a single byte, in tokenizers that fall back to bytes."""


@dataclass(frozen=True)
class Translation:
    """One model's tokens in the merged model's vocabulary.

    Attributes:
        vocabulary: The merged model's vocabulary.
        model: The model.
        tokenizer: Tokenizer of the model's text; an adapter's may have more tokens than its base's.
    """

    vocabulary: Vocabulary
    model: ModelReference
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def _own(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()

    @cached_property
    def _ids(self) -> dict[int, int]:
        """The model's id -> the merged model's id, for every token that both have."""
        new = self.vocabulary.info.tokenizer.get_vocab()
        permutation = self.vocabulary.info.permutations[self.model]
        return {
            number: new[token]
            for token, number in self._own.items()
            if token in new and permutation[new[token]] == number
        }

    @cached_property
    def _spellings(self) -> dict[int, tuple[int, ...]]:
        return {}

    def spelled(self, own: int) -> tuple[int, ...]:
        """Replace a token by tokens that the merged model has too.

        The merged model's tokenizer cuts the token. Tokens that were added to a tokenizer mean
        more than their letters, and are not cut.

        Args:
            own: The model's id of the token.

        Returns:
            The model's ids of the parts; the token's own id if it is not or cannot be cut.
        """
        if own in self._ids:
            return (own,)
        if own not in self._spellings:
            self._spellings[own] = self._spell(own)
        return self._spellings[own]

    def _spell(self, own: int) -> tuple[int, ...]:
        backend = getattr(self.vocabulary.info.tokenizer, "backend_tokenizer", None)
        token = str(self.tokenizer.convert_ids_to_tokens(own))
        if backend is None or own in self.tokenizer.added_tokens_decoder:
            return (own,)
        pieces = [piece.value for piece in backend.model.tokenize(token)]
        ids = [self._own.get(piece, LOST) for piece in pieces]
        whole = b"".join(map(_bytes_of, pieces)) == token.encode()
        return tuple(ids) if whole and all(number in self._ids for number in ids) else (own,)

    def translated(self, tokens: Tensor) -> Tensor:
        """A text's ids in the merged model's vocabulary, int64 of the same shape.

        Args:
            tokens: The model's ids, int64 of any shape.

        Raises:
            CalibrationError: If the merged model will not have some of the tokens.
        """
        flat: list[int] = tokens.flatten().tolist()
        because = f"it gets the tokenizer of {self.vocabulary.giver}"
        if self.vocabulary.giver == "union":
            because = "mergekit finds them in no tokenizer with an id below `vocab_size`"
        lost = [own for own in flat if own not in self._ids]
        refuse_lost(lost, self.model, self.tokenizer, because)
        ids = torch.tensor([self._ids[own] for own in flat], dtype=torch.int64)
        return ids.view(tokens.shape)

    def shared_reading(self, tokens: Tensor) -> float:
        """Fraction of a text's tokens that the merged model's tokenizer finds in the text too.

        Args:
            tokens: The model's ids, int64 `[sequences, length]`; `translated` must accept them.
        """
        tokenizer = self.vocabulary.info.tokenizer
        common = 0
        for row, ids in zip(tokens, self.translated(tokens).tolist(), strict=True):
            text = self.tokenizer.decode(row, clean_up_tokenization_spaces=False)
            read = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            common += (Counter(read) & Counter(ids)).total()
        return common / tokens.numel()


def refuse_lost(
    lost: Sequence[int], model: ModelReference, tokenizer: PreTrainedTokenizerBase, because: str
) -> None:
    """Refuse text with tokens that the merged model will not have.

    Args:
        lost: The model's own ids of such tokens; they may repeat.
        model: The model, for the message.
        tokenizer: Tokenizer of the model's text.
        because: The reason why the merged model will not have them.

    Raises:
        CalibrationError: If there are any.
    """
    ids = sorted(set(lost))
    if ids:
        named = listed(tokenizer.convert_ids_to_tokens(ids))
        raise CalibrationError(
            f"calibration of {model}: its text has {len(ids)} tokens ({named}) that the merged "
            f"model will not have, as {because}; write `tokenizer: {{source: union}}`, or leave "
            f"out the text that has them"
        )


def _bytes_of(piece: str) -> bytes:
    found = _BYTE.fullmatch(piece)
    return bytes([int(found[1], 16)]) if found else piece.encode()
