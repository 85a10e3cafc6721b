"""The stages of a fit, mergekit's tasks that load them, and the streams at the model's input."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.graph import Task

from mergekit_dam.host.compat import Executor
from mergekit_dam.host.gathers import labelled
from mergekit_dam.host.places import PlacedTensor
from mergekit_dam.host.prepare import Prepared
from mergekit_dam.host.room import check_room
from mergekit_dam.journal import Journal
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.sources.stage import Loaded, Models, Stage, StageKind
from mergekit_dam.stored import folder_bytes
from mergekit_dam.streams import distributed
from mergekit_dam.streams.storage import boundary_bytes, choose_storage, streams_bytes
from mergekit_dam.streams.stream import Stream


@dataclass(frozen=True)
class PlannedStage:
    """A stage, and the tasks that gather its tensors.

    Attributes:
        stage: the stage.
        label: label by which mergekit's executor orders the stages.
        gathers: one task per output tensor, in the order of the stage; then one per borrowed one.
    """

    stage: Stage
    label: str
    gathers: tuple[Task[Any], ...]

    def without_borrowed(self) -> "PlannedStage":
        """The stage with only its own tensors."""
        own = self.gathers[: len(self.stage.tensors)]
        return PlannedStage(replace(self.stage, borrowed=()), self.label, own)


def load_stage(planned: PlannedStage) -> Loaded:
    """Read the tensors of a stage with mergekit's executor."""
    tasks = list(planned.gathers)
    found = dict(Executor(tasks).run(quiet=True)) if tasks else {}
    return {
        spec.name: found[task] for spec, task in zip(planned.stage.all_tensors, tasks, strict=True)
    }


def planned_stages(placed: Sequence[PlacedTensor], models: Models) -> list[PlannedStage]:
    """The stages in forward order."""
    kinds: list[tuple[StageKind, int]] = [("input", 0)]
    kinds += [("block", index) for index in range(len(models.output.blocks))]
    kinds += [("output", 0)]
    tied = _tied_head(placed, models.output)
    stages = []
    for number, (kind, index) in enumerate(kinds):
        own = [tensor for tensor in placed if (tensor.kind, tensor.index) == (kind, index)]
        borrowed = [tied] if kind == "output" and tied is not None else []
        label = f"dam {number:05d}"
        stages.append(
            PlannedStage(
                Stage(
                    models,
                    kind,
                    index,
                    [tensor.spec for tensor in own],
                    [tensor.spec for tensor in borrowed],
                ),
                label,
                tuple(labelled(tensor.gather, label) for tensor in [*own, *borrowed]),
            )
        )
    return stages


def _tied_head(placed: Sequence[PlacedTensor], decoder: Decoder) -> PlacedTensor | None:
    """The tensor of the input stage to which the head is tied, or None."""
    name = decoder.names.canonical(f"{decoder.head_name}.weight")
    return next((p for p in placed if p.kind == "input" and p.spec.in_model == name), None)


def calibration_streams(
    prepared: Prepared,
    order: Sequence[ModelReference],
    hidden: int,
    device: torch.device,
    out_path: Path,
    written: int,
) -> list[Stream]:
    """This process's share of the calibration tokens of every model that has some.

    Args:
        prepared: the checked configuration with its calibration tokens.
        order: the sources.
        hidden: size of a hidden state.
        device: device on which parts run.
        out_path: folder for streams that are kept on disk.
        written: bytes of the merged model.

    Raises:
        DamError: the disk lacks room for the model and the streams.
    """
    tokens = sum(calibration.tokens.numel() for calibration in prepared.calibration.values())
    size = streams_bytes(hidden, tokens)
    storage = choose_storage(prepared.run.stream_offload, size, device, out_path)
    if distributed.is_first():  # which writes the model
        check_room(
            out_path,
            model=written,
            temporary=size if storage.place == "disk" else 0,
            kept=_still_to_keep(prepared.journal, boundary_bytes(hidden, tokens)),
        )
    return [
        Stream.of_tokens(
            order.index(model),
            calibration.tokens,
            prepared.run.held_out(calibration.tokens.shape[0]),
            storage,
            turn=turn,
            counted=calibration.counted,
        )
        for turn, (model, calibration) in enumerate(prepared.calibration.items())
    ]


def _still_to_keep(journal: Journal | None, size: int) -> int:
    """Bytes of hidden states for a next run that are not on the disk from the one before."""
    return 0 if journal is None else max(0, size - folder_bytes(journal.folder))
