"""The places of a configuration that may hold parameters."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mergekit.common import ModelReference
from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
    ParameterSetting,
)

from mergekit_dam.request.method import DamMerge

SPECS = {spec.name: spec for spec in DamMerge.spec.parameters}


@dataclass(frozen=True)
class Scope:
    """A place in the YAML that may hold parameters.

    Attributes:
        label: Name of the place in messages to the user.
        level: Range of the parameters: the whole merge, a slice or module, or one model.
        settings: The parameters that stand there, by name.
        model: The model that they hold for, at level "model".
    """

    label: str
    level: Literal["top", "group", "model"]
    settings: dict[str, ParameterSetting]
    model: ModelReference | None = None


def scopes_of(config: MergeConfiguration) -> Iterator[Scope]:
    """Yield every place of a configuration that may hold parameters."""
    yield Scope("parameters (top level)", "top", config.parameters or {})
    yield from _inputs("models", config.models)
    yield from _slices("slices", config.slices)
    for name, module in (config.modules or {}).items():
        yield Scope(f"modules.{name}", "group", module.parameters or {})
        yield from _inputs(f"modules.{name}.models", module.models)
        yield from _slices(f"modules.{name}.slices", module.slices)


def _inputs(
    path: str, inputs: Sequence[InputModelDefinition | InputSliceDefinition] | None
) -> Iterator[Scope]:
    for index, entry in enumerate(inputs or ()):
        label = f"{path}[{index}] ({entry.model})"
        yield Scope(label, "model", entry.parameters or {}, entry.model)


def _slices(path: str, slices: list[OutputSliceDefinition] | None) -> Iterator[Scope]:
    for index, entry in enumerate(slices or ()):
        yield Scope(f"{path}[{index}]", "group", entry.parameters or {})
        yield from _inputs(f"{path}[{index}].sources", entry.sources)


def input_lists(config: MergeConfiguration) -> Iterator[tuple[str, list[ModelReference]]]:
    """Yield every list of inputs, with its place; a list must name each model only once."""
    groups: dict[str, MergeConfiguration | OutputModuleDefinition] = {"": config}
    groups |= {f"modules.{name}.": module for name, module in (config.modules or {}).items()}
    for path, group in groups.items():
        yield f"{path}models", [entry.model for entry in group.models or ()]
        for index, entry in enumerate(group.slices or ()):
            yield f"{path}slices[{index}].sources", [source.model for source in entry.sources]


def listed_models(config: MergeConfiguration) -> list[ModelReference]:
    """The models that a configuration lists as inputs, in order, without repetitions."""
    found = [scope.model for scope in scopes_of(config) if scope.model is not None]
    return list(dict.fromkeys(found))


def idle_filters(config: MergeConfiguration, tensors: Collection[str]) -> dict[str, list[str]]:
    """Filters that no tensor passes, by the parameter that they stand in.

    Args:
        config: A configuration.
        tensors: Names of the tensors to merge, as mergekit has them.
    """
    found: dict[str, list[str]] = {}
    for scope in scopes_of(config):
        for name, setting in scope.settings.items():
            for text in _filters(setting):
                if text != "*" and not any(text in tensor for tensor in tensors):
                    found[name] = list(dict.fromkeys([*found.get(name, ()), text]))
    return found


def _filters(setting: ParameterSetting) -> Iterator[str]:
    if isinstance(setting, list):
        for entry in setting:
            yield from _filters(entry)
    elif isinstance(setting, ConditionalParameter) and setting.filter is not None:
        yield setting.filter
        yield from _filters(setting.value)


def scalars(setting: ParameterSetting) -> Iterator[Any]:
    """Yield the values inside a setting, without its filters and gradients."""
    if isinstance(setting, ConditionalParameter):
        yield from scalars(setting.value)
    elif isinstance(setting, list):
        for entry in setting:
            yield from scalars(entry)
    else:
        yield setting
