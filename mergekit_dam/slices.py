"""Slices: layers of some models stacked, where each takes part in some slices or in all.

A slice merges the models that it lists. The data of the others counts there too: a model's
teacher is the stack that the slices describe, made of that model's layers alone. In a slice that
does not list it, those are its own layers of the range that the slice takes of its first model.
"""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence

from mergekit.common import ModelReference
from mergekit.config import InputSliceDefinition, MergeConfiguration, OutputSliceDefinition
from transformers import PretrainedConfig

from mergekit_dam.errors import ConfigError


class TaughtSlice(OutputSliceDefinition):
    """A slice that also reads the layers of models that it does not merge.

    Attributes:
        teaching: those models, which stand among its sources.
    """

    teaching: frozenset[ModelReference] = frozenset()


def taught(
    slices: Sequence[OutputSliceDefinition], teachers: Collection[ModelReference]
) -> list[TaughtSlice]:
    """The same slices, with every teacher among the sources of each.

    Args:
        teachers: the models whose data counts in the fit.
    """
    parameters = {s.model: s.parameters for entry in reversed(slices) for s in entry.sources}
    found = []
    for entry in slices:
        layers = entry.sources[0].layer_range
        absent = [model for model in teachers if model not in {s.model for s in entry.sources}]
        added = [
            InputSliceDefinition(model=model, layer_range=layers, parameters=parameters.get(model))
            for model in absent
        ]
        found.append(
            TaughtSlice(
                sources=[*entry.sources, *added],
                base_model=entry.base_model,
                residual_weight=entry.residual_weight,
                parameters=entry.parameters,
                teaching=frozenset(absent),
            )
        )
    return found


def stacks(slices: Sequence[OutputSliceDefinition]) -> dict[ModelReference, tuple[int, ...]]:
    """Which of its own layers every model has at each layer of the merged model.

    Models that a slice does not read are left out.
    """
    everywhere = set.intersection(*({s.model for s in entry.sources} for entry in slices))
    found: dict[ModelReference, tuple[int, ...]] = dict.fromkeys(everywhere, ())
    for entry in slices:
        for source in entry.sources:
            if source.model in found:
                found[source.model] += tuple(range(*source.layer_range))
    return found


def stacked(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The configuration of a model made of some layers of another one, in some order.

    Args:
        config: of the other one; returned as it is if all its layers are taken in their order.
    """
    if list(layers) == list(range(config.get_text_config().num_hidden_layers)):
        return config
    found = copy.deepcopy(config)
    follow(found, config, layers)
    return found


def follow(config: PretrainedConfig, donor: PretrainedConfig, layers: Sequence[int]) -> None:
    """Have a configuration, in place, say of every layer what its donor says of the layer there.

    mergekit sets the number of layers alone; transformers then refuses to save the others.

    Raises:
        ConfigError: the donor has no such layers.
    """
    text, own = config.get_text_config(), donor.get_text_config()
    text.num_hidden_layers = len(layers)
    for name in _of_each_layer(own):
        values = getattr(own, name)
        if max(layers) >= len(values):
            raise ConfigError(
                [
                    f"slices: the merged model's configuration is that of the base, else of the "
                    f"first model, and its `{name}` tells of {len(values)} layers; layer "
                    f"{max(layers)} is asked for. Name a model with as many layers there"
                ]
            )
        setattr(text, name, [values[layer] for layer in layers])


def _of_each_layer(config: PretrainedConfig) -> list[str]:
    """Lists in a configuration that have an entry for each layer.

    Those are as long as there are layers whatever their number, which a class's defaults show.
    """
    depth = config.num_hidden_layers
    try:
        probe = type(config)(**{"num_hidden_layers": depth + 1})
    except (TypeError, ValueError):
        return []
    return [
        name
        for name, value in probe.to_dict().items()
        if isinstance(value, list)
        and len(value) == depth + 1
        and isinstance(getattr(config, name, None), list)
        and len(getattr(config, name)) == depth
    ]


def named_slices(config: MergeConfiguration) -> Iterator[tuple[str, OutputSliceDefinition]]:
    """Every slice of a configuration, with its place in the YAML."""
    for index, entry in enumerate(config.slices or ()):
        yield f"slices[{index}]", entry
    for name, module in (config.modules or {}).items():
        for index, entry in enumerate(module.slices or ()):
            yield f"modules.{name}.slices[{index}]", entry


def check_slices(config: MergeConfiguration) -> list[str]:
    """Problems of slices that the YAML alone can tell."""
    problems = []
    base = config.base_model
    for label, entry in named_slices(config):
        if not entry.sources:
            problems.append(f"{label}: required at least one source; got none")
            continue
        if entry.base_model is not None and entry.base_model != base:
            problems.append(
                f"{label}: `base_model` differs from that of the whole merge; dam takes one base "
                f"for all slices"
            )
        if entry.residual_weight is not None:
            problems.append(f"{label}: mergekit ignores `residual_weight`; remove it")
        models = list(dict.fromkeys(source.model for source in entry.sources))
        if base is not None and base not in models and len(models) > 1:
            problems.append(
                f"{label}: {_names(models)} are merged without the base {base}; add it to the "
                f"`sources`, or name no `base_model`"
            )
        for source in entry.sources:
            first, end = source.layer_range
            if not 0 <= first < end:
                problems.append(
                    f"{label}: required `layer_range: [first, end]` with 0 <= first < end, got "
                    f"[{first}, {end}] of {source.model}"
                )
        lengths = {source.model: _length(source) for source in entry.sources}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{count} of {model}" for model, count in lengths.items())
            problems.append(f"{label}: required as many layers of every model, got {counts}")
    return problems


def check_layers(
    config: MergeConfiguration,
    layers: Mapping[ModelReference, int],
    teachers: Collection[ModelReference],
) -> list[str]:
    """Problems of layer ranges that the models' own configurations tell.

    Args:
        layers: how many each model has.
        teachers: the models whose data counts in the fit.
    """
    problems = []
    if config.models:
        listed = [entry.model for entry in config.models]
        if config.base_model is not None and config.base_model not in listed:
            listed.append(config.base_model)
        counts = {model: layers[model] for model in listed if model in layers}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{count} of {model}" for model, count in counts.items())
            problems.append(
                f"models: required as many layers of every model, got {told}; say with `slices` "
                f"and `layer_range` which layers to merge"
            )
    for label, entry in named_slices(config):
        for source in entry.sources:
            has = layers.get(source.model, source.layer_range[1])
            if source.layer_range[1] > has:
                problems.append(
                    f"{label}: `layer_range` is {list(source.layer_range)}, but {source.model} has "
                    f"{has} layers"
                )
        listed = [source.model for source in entry.sources]
        end = entry.sources[0].layer_range[1]
        for model in teachers:
            if model not in listed and end > layers.get(model, end):
                problems.append(
                    f"{label}: takes layers up to {end} of {listed[0]}; {model}, which is not "
                    f"merged here, has {layers[model]}, so that it has no such layers to teach by. "
                    f"Set `loss_weight: 0` for it, or list it in every slice"
                )
    return problems


def _length(source: InputSliceDefinition) -> int:
    return source.layer_range[1] - source.layer_range[0]


def _names(models: Sequence[ModelReference]) -> str:
    return " and ".join(map(str, models))
