"""The plain data from which mergekit's plan of a merge is turned into tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.coefficients.tensors import TensorSpec
from mergekit_dam.host.fused import Region
from mergekit_dam.host.headers import WeightTask
from mergekit_dam.host.prepare import Prepared
from mergekit_dam.host.tasks import FitStage, Known, MergeKnown, Search
from mergekit_dam.journal import Journal
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.model.probe import make_decoder


@dataclass(frozen=True)
class Merge:
    """A merge as mergekit is about to plan it.

    Attributes:
        prepared: the checked configuration with its data.
        config: configuration of the merged model.
        options: mergekit's options.
        out_dtype: name of the dtype in which tensors are written, if it is not the sources'.
        parameters: parameters of the configuration, for the provenance.
        out_path: folder of the merged model.
        stacks: for every model, the index of its own layer at each layer of the merged model.
    """

    prepared: Prepared
    config: PretrainedConfig
    options: MergeOptions
    out_dtype: str | None
    parameters: Mapping[str, Any]
    out_path: Path
    stacks: Mapping[ModelReference, Sequence[int]]

    @property
    def journal(self) -> Journal:
        """What the merge keeps on the disk: for a next run, or for this one alone."""
        return self.prepared.journal or Journal(self.out_path, keeps=False)

    def decoder(self) -> Decoder:
        """The decoder of the merged model."""
        device = torch.device("cpu")
        return make_decoder(self.config, device, trust_remote_code=self.options.trust_remote_code)


@dataclass(frozen=True)
class Tensors:
    """The tensors that are merged: those that mergekit planned, with experts fused.

    Attributes:
        tasks: mergekit's tasks, which would merge each tensor by itself.
        specs: how each tensor is fitted, in the same order.
        shapes: output tensor's name -> shape, where headers give it.
        order: the sources, in the order of the rows of coefficients.
        regions: positions of planned tensors in the fused tensors that replace them, by name.
    """

    tasks: Sequence[WeightTask]
    specs: Sequence[TensorSpec]
    shapes: Mapping[str, tuple[int, ...]]
    order: tuple[ModelReference, ...]
    regions: Mapping[str, Region]

    def known(self, spec: TensorSpec, gather: Task[Any], record: MergeRecord) -> MergeKnown:
        """The task that merges a tensor with coefficients that a record holds already."""
        return MergeKnown(known=Known(spec, gather, self.order, record))


@dataclass
class Tasks:
    """The tasks that replace mergekit's.

    Attributes:
        merged: output tensor's name -> the task that merges it.
        last: the task after which all coefficients are known; None if a record holds them.
        record: the record of coefficients that are known from planning.
    """

    merged: dict[str, Task[Any]] = field(default_factory=dict)
    last: FitStage | Search | None = None
    record: MergeRecord | None = None
