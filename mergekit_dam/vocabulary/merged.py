"""The merged model's vocabulary, where a configuration has mergekit build one of its own.

mergekit brings every model's rows of embedding and head into the order of that vocabulary, so
that a model runs on ids of it as it runs on its own ids: a token keeps its row, whatever its
number. What is left to know is which id a token of a text becomes (`translation`), and which tokens
a model does not have: mergekit gives it rows of other models there, whose logits mean nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.common import ModelReference, set_config_value
from torch import Tensor
from transformers import PretrainedConfig

LOST = -1
"""What mergekit's permutations have in place of the id of a token that is not there."""


@dataclass(frozen=True)
class OwnRows:
    """Key of a model's own rows, where the configuration forces other ones on its tokens."""

    model: ModelReference


@dataclass(frozen=True, eq=False)  # tasks that carry one are hashed: by its identity
class Vocabulary:
    """The ids of the merged model.

    Attributes:
        info: mergekit's `TokenizerInfo`: the tokenizer, and for every model its own id of each
            token, -1 for tokens that it does not have.
        size: rows of the embedding; more than there are tokens where they are padded.
        giver: whose it is, for people.
    """

    info: Any
    size: int
    giver: str

    def unknown_to(self, model: ModelReference) -> Tensor | None:
        """Ids that mean nothing to a model: bool `[size]`; None if it has all tokens.

        Rows of padding are among them, where there are any.
        """
        unknown = torch.ones(self.size, dtype=torch.bool)
        known = [new for new, own in self.info.permutations[model].items() if own >= 0]
        unknown[torch.tensor(known, dtype=torch.int64)] = False
        return unknown if unknown.any() else None

    def tell(self, config: PretrainedConfig, key: str) -> None:
        """Write size and special tokens into the merged model's configuration.

        mergekit writes the size alone, and leaves the ids of special tokens that they have in the
        base, or in the first model: of another model's vocabulary, these are other tokens.

        Args:
            config: that of the base, else of the first model; changed in place.
            key: of the size.
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
    """Ids of special tokens in another vocabulary; what its tokenizer has in place of lost ones."""
    if isinstance(value, int):
        return ids.get(value, instead) if value >= 0 else value
    return [ids[own] for own in value if own in ids] or instead
