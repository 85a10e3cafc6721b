"""Slices: layers of some models stacked, where each takes part in some slices or in all.

A slice merges the models that it lists. The data of the others counts there too: a model's
teacher is the stack that the slices describe, made of that model's layers alone. In a slice that
does not list it, those are its own layers of the range that the slice takes of its first model.
"""

import copy
from collections.abc import Collection, Sequence

from mergekit.common import ModelReference
from mergekit.config import InputSliceDefinition, OutputSliceDefinition
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
                f"slices: the merged model's configuration is that of the base, else of the "
                f"first model, and its `{name}` tells of {len(values)} layers; layer "
                f"{max(layers)} is asked for. Name a model with as many layers there"
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
