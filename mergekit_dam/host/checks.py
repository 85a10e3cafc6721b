"""Checks of the sources' tensors that need no weights: names and shapes, from headers alone."""

from collections.abc import Mapping, Sequence

from mergekit.common import ModelReference

from mergekit_dam.errors import ArchitectureError, ConfigError, listed
from mergekit_dam.host.compat import (
    ExecuteMergeMethodTask,
    GatherTensors,
    LoaderCache,
    PermutedVocabulary,
    TruncatedVocabulary,
    WeightInfo,
)
from mergekit_dam.host.headers import file_headers, is_made, present_name
from mergekit_dam.host.places import PlacedTensor
from mergekit_dam.model.decoder import Decoder

_SHOWN = 5


def check_headers(
    planned: Sequence[tuple[WeightInfo, ExecuteMergeMethodTask]], order: Sequence[ModelReference]
) -> dict[str, tuple[int, ...]]:
    """Check that every source has every planned tensor, all of one shape.

    Vocabularies that an adapter aligns may have any number of rows. Pickled tensors, and tensors
    that a checkpoint stores in another layout, are checked when they are loaded.

    Returns:
        Output tensor's name -> shape, where headers give it.

    Raises:
        ArchitectureError: tensors are missing or differ; the message names the first ones.
    """
    problems = []
    shapes: dict[str, tuple[int, ...]] = {}
    for weight, task in planned:
        gather, free = task.gather_tensors, None
        if isinstance(gather, (PermutedVocabulary, TruncatedVocabulary)):
            gather, free = gather.gather_tensors, weight.vocabulary_axis
        assert isinstance(gather, GatherTensors)
        found = {}
        # Models that the slice leaves out have no tensor; the map itself is ordered by hash.
        for model in (model for model in order if model in gather.weight_info.data):
            loader = LoaderCache().get(model)
            info = gather.weight_info[model]
            name = present_name(info, loader)
            if name is not None:
                header = file_headers(loader).get(name)
                found[model] = None if header is None else header.shape
            elif not is_made(model, info.name, set(loader.index.tensor_paths)):
                have = "some models have it, " if weight.optional else ""
                problems.append(f"{weight.name}: {have}{model} does not have it")
        known = {model: shape for model, shape in found.items() if shape is not None}
        if free is None:
            shapes.update((weight.name, shape) for shape in known.values())
        if len({_without(shape, free) for shape in known.values()}) > 1:
            different = ", ".join(f"{m} {list(s)}" for m, s in known.items())
            hint = (
                "; write `tokenizer: {source: union}`, or pass --unsafe-truncate-embeddings where "
                "only the padding differs"
                if weight.vocabulary_axis is not None and free is None
                else ""
            )
            problems.append(f"{weight.name}: shapes differ: {different}{hint}")
    if problems:
        more = len(problems) - _SHOWN
        lines = [*problems[:_SHOWN], *([f"and {more} more"] if more > 0 else [])]
        raise ArchitectureError(
            "required the same tensors in all models, as mergekit's definition of the architecture "
            "lists them, got:\n" + "\n".join(f"  - {line}" for line in lines)
        )
    return shapes


def _without(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return shape if axis is None else shape[:axis] + shape[axis + 1 :]


def check_complete(decoder: Decoder, placed: Sequence[PlacedTensor]) -> None:
    """Check that mergekit has planned every weight that a model loads.

    Raises:
        ArchitectureError: weights are missing; the message names the first ones.
    """
    planned = {decoder.names.canonical(tensor.spec.name) for tensor in placed}
    missing = [name for name, first in decoder.names.first.items() if first not in planned]
    if missing:
        raise ArchitectureError(
            f"mergekit plans no tensor for {listed(missing)}, which {type(decoder.model).__name__} "
            f"needs; mergekit's definition of the architecture (that of the first model) does not "
            f"fit transformers' model, so any merge method would leave them out"
        )


def refuse_outside(placed: Sequence[PlacedTensor]) -> None:
    """Refuse a merge with weights outside of the decoder, which do not run on text.

    Raises:
        ConfigError: there are such weights; the message names the first ones.
    """
    outside = [tensor.spec.name for tensor in placed if tensor.kind == "outside"]
    if outside:
        raise ConfigError(
            f"`other_weights: error`, but {len(outside)} tensors are outside of the decoder "
            f"({listed(outside)}); set "
            f"`other_weights: average` to average them"
        )


def check_shapes(decoder: Decoder, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that every tensor has the shape that the merged model's configuration gives it.

    `check_headers` does not see this: if slices stack models of different sizes, the sources of
    each single tensor still agree.

    Args:
        decoder: the decoder of the merged model.
        shapes: shapes of planned tensors, where headers give them.

    Raises:
        ArchitectureError: shapes are wrong; the message names the first tensors.
    """
    own = {name: tuple(w.shape) for name, w in decoder.model.state_dict(keep_vars=True).items()}
    expected = {name: own.get(decoder.names.in_model(name) or "") for name in shapes}
    wrong = [name for name, shape in expected.items() if shape not in (None, shapes[name])]
    if wrong:
        others = [f"{n} {list(shapes[n])}, not {list(expected[n] or ())}" for n in wrong]
        raise ArchitectureError(
            f"required tensors of the shapes that the merged model's configuration asks for (that "
            f"of the base, or else of the first model), got {listed(others)}; "
            f"stack models of one size, and align "
            f"vocabularies, for example with `tokenizer: {{source: union}}`"
        )
