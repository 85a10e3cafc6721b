"""All private or version-dependent names of mergekit that this package uses, in one file.

Written against mergekit 0.1.5. `mergekit.common`, `mergekit.config`, `mergekit.options`, `Task`,
and the registry of merge methods with its base classes are public and stable: files import them
directly. Everything else is imported here, for the files of this package and for `estimate/`, so
that the next release of mergekit breaks this file alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# mergekit's definitions of architectures: their weights, and how checkpoints may store them.
from mergekit.architecture import (
    ModelArchitecture,
    WeightInfo,
    arch_info_for_config,
    get_architecture_info,
)
from mergekit.architecture.conversion import can_convert_checkpoint_keys as can_convert
from mergekit.architecture.conversion import convert_checkpoint_tensors as convert

# The executor of task graphs, and the tasks that read and write tensors.
from mergekit.graph import Executor
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import GatherTensors, LoaderCache, LoadTensor, SaveTensor

# The configuration that a merged model is written with.
from mergekit.merge import _model_out_config as out_model_config
from mergekit.merge_methods.buffers import copy_non_floating_buffer

# The task that would merge one tensor; it carries the parameters evaluated for that tensor.
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.plan import MergePlanner

# The vocabulary of the merged model, and the tasks that align embeddings with it.
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary, TokenizerInfo
from mergekit.tokenizer.build import build_tokenizer, get_vocab_size
from mergekit.tokenizer.config import ModelTokenEmbedding, TokenEmbeddingConfig, ZeroEmbedding
from mergekit.tokenizer.truncate import TruncatedVocabulary

__all__ = [
    "BuildTokenizer",
    "ExecuteMergeMethodTask",
    "Executor",
    "GatherTensors",
    "LazyTensorLoader",
    "LoadTensor",
    "LoaderCache",
    "MergePlanner",
    "ModelArchitecture",
    "ModelTokenEmbedding",
    "PermutedVocabulary",
    "Planner",
    "SaveTensor",
    "ShardedTensorIndex",
    "TokenEmbeddingConfig",
    "TokenizerInfo",
    "TruncatedVocabulary",
    "WeightInfo",
    "ZeroEmbedding",
    "arch_info_for_config",
    "build_tokenizer",
    "can_convert",
    "convert",
    "copy_non_floating_buffer",
    "get_architecture_info",
    "get_vocab_size",
    "out_model_config",
]

_MISSING = object()


class Planner:
    """Access to those parts of a `MergePlanner` that a dam merge uses.

    Attributes:
        stock: mergekit's planner.
    """

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    @property
    def tensors(self) -> list[tuple[WeightInfo, Any]]:
        """The planned tensors, each with the task that merges it."""
        planned: list[tuple[WeightInfo, Any]] = self.stock._tensors
        return planned

    @tensors.setter
    def tensors(self, tensors: list[tuple[WeightInfo, Any]]) -> None:
        self.stock._tensors = tensors

    @property
    def tokenizer_task(self) -> BuildTokenizer | None:
        """The task that builds the merged model's tokenizer; None if none is built."""
        task: BuildTokenizer | None = self.stock._tokenizer_task
        return task

    @tokenizer_task.setter
    def tokenizer_task(self, task: BuildTokenizer) -> None:
        self.stock._tokenizer_task = task

    def plan(self) -> None:
        """Plan every tensor, as mergekit does."""
        stock: Any = MergePlanner
        stock._plan(self.stock)

    @contextmanager
    def replaced(self, **methods: Any) -> Iterator[None]:
        """Replace methods of this planner while the body runs.

        Args:
            methods: replacements by name: `_plan()`, `normalize_config()`, or
                `plan_tensor(weight, weights_in, models, cfg_reader)`.
        """
        own = vars(self.stock)
        before = {name: own.get(name, _MISSING) for name in methods}
        own.update(methods)
        try:
            yield
        finally:
            for name, method in before.items():
                if method is _MISSING:
                    del own[name]
                else:
                    own[name] = method
