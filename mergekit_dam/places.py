"""Where every planned tensor acts in the decoder, and the decoders of all sources."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from transformers import PretrainedConfig

from mergekit_dam.decoder import Decoder
from mergekit_dam.errors import ArchitectureError
from mergekit_dam.slices import stacked
from mergekit_dam.stage import StageKind, TensorPlan

Planned = tuple[WeightInfo, ExecuteMergeMethodTask]


@dataclass(frozen=True)
class Place:
    """Where one tensor acts.

    Attributes:
        kind: "outside" of the decoder, or the kind of its stage.
        index: of the block.
        plan: of the tensor.
        gather: mergekit's task that brings the tensors of all sources.
    """

    kind: StageKind | Literal["outside"]
    index: int
    plan: TensorPlan
    gather: Task[Any]


def source_decoders(
    output: Decoder,
    order: Sequence[ModelReference],
    options: MergeOptions,
    stacks: Mapping[ModelReference, Sequence[int]],
) -> tuple[Decoder, ...]:
    """Every source's decoder; the merged model's own wherever the forward pass is the same.

    Args:
        stacks: which of its layers a source has at each layer of the merged model; sources that
            have none there run nothing.

    Raises:
        ArchitectureError: a source has a head of its own, the merged model none.
    """
    decoders = {_forward_key(output.config): output}
    found = []
    for model in order:
        config = model.config(trust_remote_code=options.trust_remote_code)
        if _ties_head(output.config) and not _ties_head(config):
            raise ArchitectureError(
                f"{model} has an output head of its own, but the merged model takes its from the "
                f"embeddings: its configuration is that of the base, else of the first model. Name "
                f"one with `tie_word_embeddings: false` there"
            )
        config = stacked(config, stacks[model]) if model in stacks else output.config
        key = _forward_key(config)
        if key not in decoders:
            decoders[key] = Decoder(
                config, torch.device("cpu"), trust_remote_code=options.trust_remote_code
            )
        found.append(decoders[key])
    return tuple(found)


def _ties_head(config: PretrainedConfig) -> bool:
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


_NOT_OF_THE_FORWARD = (
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "transformers_version",
    "unk_token_id",
    "use_cache",
    "vocab_size",
)


def _forward_key(config: PretrainedConfig) -> str:
    """Equal for configurations whose blocks compute the same from the same weights."""
    values = config.to_dict()
    return str(sorted((k, str(v)) for k, v in values.items() if k not in _NOT_OF_THE_FORWARD))


def place_tensors(
    planned: Sequence[Planned], plans: Sequence[TensorPlan], decoder: Decoder
) -> list[Place]:
    """Where every planned tensor acts in the decoder."""
    names = frozenset(plan.name for plan in plans)
    parts = decoder.part_of(frozenset(n for n in names if decoder.block_of(n) is None))
    places = []
    for (_, task), plan in zip(planned, plans, strict=True):
        gather, canonical = task.gather_tensors, decoder.canonical(plan.name)
        block = decoder.block_of(plan.name) if canonical is not None else None
        if canonical is None:
            places.append(Place("outside", 0, plan, gather))
        elif canonical != plan.name and canonical in names:
            tied = dataclasses.replace(plan, tied_to=canonical)
            places.append(Place("output", 0, tied, gather))
        elif block is not None:
            places.append(Place("block", block, plan, gather))
        else:
            places.append(Place(parts.get(plan.name, "outside"), 0, plan, gather))
    return places


def check_complete(decoder: Decoder, places: Sequence[Place]) -> None:
    """Every weight that a forward pass needs must have been planned by mergekit."""
    planned = {decoder.canonical(place.plan.name) for place in places}
    missing = [name for name, _ in decoder.model.named_parameters() if name not in planned]
    if missing:
        raise ArchitectureError(
            f"mergekit plans no tensor for {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''}, which the forward pass of "
            f"{type(decoder.model).__name__} needs; mergekit's definition of the architecture "
            f"(that of the first model) does not fit transformers' model"
        )


def check_shapes(decoder: Decoder, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor must have the shape that the merged model's configuration gives it.

    Where slices stack models of different sizes, no tensor differs from another of its name.

    Args:
        shapes: of planned tensors, where headers tell them.

    Raises:
        ArchitectureError: naming the first tensors that have not.
    """
    own = decoder.model.named_parameters(remove_duplicate=False)
    expected = {name: tuple(parameter.shape) for name, parameter in own}
    wrong = [name for name in shapes if name in expected and shapes[name] != expected[name]]
    if wrong:
        listed = "; ".join(f"{n}: {list(shapes[n])}, not {list(expected[n])}" for n in wrong[:3])
        raise ArchitectureError(
            f"required tensors of the shapes that the merged model's configuration asks for (it is "
            f"that of the base, else of the first model), got others: {listed}"
            f"{' and more' if len(wrong) > 3 else ''}. Stack models of one size, and align "
            f"vocabularies, for instance with `tokenizer: {{source: union}}`"
        )
