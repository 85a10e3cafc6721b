"""mergekit's tasks that gather a tensor from all sources, scheduled with their stage."""

from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task

from mergekit_dam.host.compat import (
    BuildTokenizer,
    GatherTensors,
    LoadTensor,
    PermutedVocabulary,
    TokenizerInfo,
    TruncatedVocabulary,
)
from mergekit_dam.vocabulary.merged import OwnRows, Vocabulary


def labelled(task: Task[Any], label: str) -> Task[Any]:
    """The same gather task, with its vocabulary adapters, scheduled with its stage."""
    if isinstance(task, (PermutedVocabulary, TruncatedVocabulary)):
        inner = labelled(task.gather_tensors, label)
        if isinstance(task, PermutedVocabulary) and _forces(task):
            return TeachersVocabulary.model_construct(**{**dict(task), "gather_tensors": inner})
        return task.model_copy(update={"gather_tensors": inner})
    return StageGather(**dict(task), label=label)


def _forces(task: PermutedVocabulary) -> bool:
    """Whether the configuration forces other rows on tokens than the models have for them."""
    return task.tokens is not None and any(task.tokens[token].force for token in task.tokens)


class StageLoad(LoadTensor):
    """mergekit's LoadTensor, scheduled with its stage."""

    label: str

    def group_label(self) -> str:
        """The stage's label."""
        return self.label


class StageGather(GatherTensors):
    """mergekit's GatherTensors, scheduled with its stage."""

    label: str

    def arguments(self) -> dict[str, Task[Any]]:
        """The load tasks of mergekit, with the stage's label."""
        stock = super().arguments()
        return {key: StageLoad(**dict(load), label=self.label) for key, load in stock.items()}

    def group_label(self) -> str:
        """The stage's label."""
        return self.label


class KnownTokenizer(BuildTokenizer, arbitrary_types_allowed=True):
    """mergekit's BuildTokenizer for a tokenizer that is built already.

    Every sweep would build it again.
    """

    vocabulary: Vocabulary

    def execute(self, **_: Any) -> TokenizerInfo:
        """Return the tokenizer that the check of the configuration has built."""
        info: TokenizerInfo = self.vocabulary.info
        return info


class TeachersVocabulary(PermutedVocabulary):
    """mergekit's PermutedVocabulary, for a configuration that forces embeddings on tokens.

    The merge uses the forced rows; each model, as a teacher, keeps its own.
    """

    def execute(
        self, tokenizer_info: TokenizerInfo, tensors: dict[ModelReference, torch.Tensor]
    ) -> Any:
        """The aligned tensors of all models, and their own rows under the keys `OwnRows`."""
        assert self.tokens is not None
        unforced_tokens = {
            token: self.tokens[token].model_copy(update={"force": False}) for token in self.tokens
        }
        unforced = self.model_copy(update={"tokens": unforced_tokens})
        own = PermutedVocabulary.execute(unforced, tokenizer_info, tensors)
        aligned = super().execute(tokenizer_info, tensors)
        return {**aligned, **{OwnRows(model): tensor for model, tensor in own.items()}}
