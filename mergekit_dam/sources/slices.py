"""Slices: stacked layers of several models; each model takes part in some slices or in all.

A slice merges the models that it lists. The data of the other models counts there too: a model's
teacher is the stack that the slices describe, made of that model's layers alone. In a slice that
does not list the model, the model's own layers in the range of the slice's first model are used.
"""

import copy
from collections.abc import Collection, Sequence

from mergekit.common import ModelReference
from mergekit.config import InputSliceDefinition, OutputSliceDefinition
from transformers import PretrainedConfig

from mergekit_dam.errors import ConfigError


class TaughtSlice(OutputSliceDefinition):
    """A slice that also reads layers of models that it does not merge.

    Attributes:
        teaching: Models that are among the slice's sources only as teachers.
    """

    teaching: frozenset[ModelReference] = frozenset()


def taught(
    slices: Sequence[OutputSliceDefinition], teachers: Collection[ModelReference]
) -> list[TaughtSlice]:
    """The same slices, with every teacher among the sources of each slice.

    Args:
        teachers: Models whose data counts in the fit.
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
    """For every model, its own layer at each layer of the merged model.

    Models that some slice does not read are left out.
    """
    everywhere = set.intersection(*({s.model for s in entry.sources} for entry in slices))
    found: dict[ModelReference, tuple[int, ...]] = dict.fromkeys(everywhere, ())
    for entry in slices:
        for source in entry.sources:
            if source.model in found:
                found[source.model] += tuple(range(*source.layer_range))
    return found


def stacked(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The configuration of a model that is made of some layers of another model, in some order.

    Args:
        config: Configuration of the other model; returned unchanged if `layers` are all its
            layers in order.
    """
    if list(layers) == list(range(config.get_text_config().num_hidden_layers)):
        return config
    found = copy.deepcopy(config)
    follow(found, config, layers)
    return found


def follow(config: PretrainedConfig, donor: PretrainedConfig, layers: Sequence[int]) -> None:
    """Copy the settings of the donor's layers to a configuration, in place, layer by layer.

    mergekit sets only the number of layers. transformers then refuses to save a configuration
    whose lists of settings per layer have another length.

    Args:
        layers: For each layer of `config`, the index of a layer of the donor.

    Raises:
        ConfigError: The donor does not have these layers.
    """
    text, own = config.get_text_config(), donor.get_text_config()
    text.num_hidden_layers = len(layers)
    for name in _of_each_layer(own):
        values = getattr(own, name)
        if max(layers) >= len(values):
            raise ConfigError(
                f"slices: the merged model's configuration is that of the base model, or of the "
                f"first model if there is no base, and its `{name}` has {len(values)} layers; "
                f"got layer {max(layers)}. Choose a base or first model with enough layers"
            )
        setattr(text, name, [values[layer] for layer in layers])


def _of_each_layer(config: PretrainedConfig) -> list[str]:
    """Names of the lists in a configuration that have one entry per layer.

    With one more layer, such a list of the class's defaults has one more entry.
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
