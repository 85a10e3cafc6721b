"""The merged model's vocabulary, if the configuration makes mergekit build a new one.

mergekit reorders every model's rows of embedding and head to that vocabulary. A token keeps its
row and only gets a new id, so that a model runs on the new ids as on its own. Two things remain:
`translation` finds the new ids of a text's tokens, and this module finds the tokens that a model
does not have. mergekit gives it rows of other models there, and their logits mean nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.common import ModelReference, set_config_value
from torch import Tensor
from transformers import PretrainedConfig

LOST = -1
"""Value in mergekit's permutations for a token that a model does not have."""


@dataclass(frozen=True)
class OwnRows:
    """Key of a model's own rows, if the configuration gives its tokens other rows."""

    model: ModelReference


@dataclass(frozen=True, eq=False)  # tasks that carry one are hashed: by its identity
class Vocabulary:
    """The ids of the merged model.

    Attributes:
        info: mergekit's `TokenizerInfo`: the tokenizer, and every model's own id of each token
            (-1 if it does not have the token).
        size: Number of rows of the embedding, including rows of padding.
        giver: Name of the vocabulary's source, for messages.
    """

    info: Any
    size: int
    giver: str

    def unknown_to(self, model: ModelReference) -> Tensor | None:
        """Mask of the ids that a model does not have: bool `[size]`, or None if it has all.

        Rows of padding count as ids that it does not have.
        """
        unknown = torch.ones(self.size, dtype=torch.bool)
        known = [new for new, own in self.info.permutations[model].items() if own >= 0]
        unknown[torch.tensor(known, dtype=torch.int64)] = False
        return unknown if unknown.any() else None

    def tell(self, config: PretrainedConfig, key: str) -> None:
        """Write size and special tokens into the merged model's configuration.

        mergekit writes only the size. It keeps the ids of special tokens from the base or the
        first model, but in another vocabulary these ids belong to other tokens.

        Args:
            config: Configuration of the base, or of the first model; changed in place.
            key: Key of the vocabulary size.
        """
        set_config_value(config, key, self.size)
        donor = next(iter(self.info.permutations.values()))
        ids = {own: new for new, own in donor.items() if own >= 0}
        for part in {id(own): own for own in (config, config.get_text_config())}.values():
            for name, value in part.to_dict().items():
                if name.endswith("_token_id") and value is not None:
                    instead = getattr(self.info.tokenizer, name, None)
                    setattr(part, name, _renumbered(value, ids, instead))


def _renumbered(
    value: int | list[int], ids: Mapping[int, int], instead: int | None
) -> int | list[int] | None:
    """Ids of special tokens in a new vocabulary, or its tokenizer's own if they are not in it."""
    if isinstance(value, int):
        return ids.get(value, instead) if value >= 0 else value
    return [ids[own] for own in value if own in ids] or instead
