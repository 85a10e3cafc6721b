"""Checks of slices, which say from which layers of the models a merged layer is made."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from mergekit.common import ModelReference
from mergekit.config import InputSliceDefinition, MergeConfiguration, OutputSliceDefinition


def named_slices(config: MergeConfiguration) -> Iterator[tuple[str, OutputSliceDefinition]]:
    """Yield every slice of a configuration, with its place in the YAML."""
    for index, entry in enumerate(config.slices or ()):
        yield f"slices[{index}]", entry
    for name, module in (config.modules or {}).items():
        for index, entry in enumerate(module.slices or ()):
            yield f"modules.{name}.slices[{index}]", entry


def check_slices(config: MergeConfiguration) -> list[str]:
    """Problems with slices that can be found from the YAML alone."""
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
            problems.append(f"{label}: required equally many layers of every model, got {counts}")
    return problems


def check_layers(
    config: MergeConfiguration,
    layers: Mapping[ModelReference, int],
    teachers: Collection[ModelReference],
) -> list[str]:
    """Problems with layer ranges that can be found from the models' own configurations.

    Args:
        config: The configuration of the merge.
        layers: Number of layers of each model.
        teachers: Models whose data counts in the fit.
    """
    problems = []
    if config.models:
        listed = [entry.model for entry in config.models]
        if config.base_model is not None and config.base_model not in listed:
            listed.append(config.base_model)
        counts = {model: layers[model] for model in listed if model in layers}
        if len(set(counts.values())) > 1:
            listing = ", ".join(f"{count} of {model}" for model, count in counts.items())
            problems.append(
                f"models: required equally many layers of every model, got {listing}; choose the "
                f"layers to merge with `slices` and `layer_range`"
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
                    f"merged here, has {layers[model]}, too few to be a teacher here. Set "
                    f"`loss_weight: 0` for it, or list it in every slice"
                )
    return problems


def _length(source: InputSliceDefinition) -> int:
    return source.layer_range[1] - source.layer_range[0]


def _names(models: Sequence[ModelReference]) -> str:
    return " and ".join(map(str, models))
