"""Steps of mergekit-multi: which values of a dam step refer to other steps.

mergekit replaces every value of a configuration that equals a step's name by the folder of the
model that the step writes. So `coefficients` and `start` may name an earlier dam step. But a
`calibration` always names text, and `merge_method` a method, even if a step has the same name.
"""

from collections.abc import Callable, Collection

from mergekit.config import MergeConfiguration, ParameterSetting

from mergekit_dam.request.scopes import scopes_of

Patch = Callable[[MergeConfiguration, Collection[str], str], tuple[MergeConfiguration, set[str]]]

_HIDDEN = "(hidden)"
"""Placeholder for values that are not to be taken as names of steps; no step has this name."""


def patched(
    stock: Patch, config: MergeConfiguration, names: Collection[str], folder: str
) -> tuple[MergeConfiguration, set[str]]:
    """Replace the names of steps in a dam step by their folders, as mergekit does.

    Args:
        stock: mergekit's own function for this.
        config: configuration of the dam step.
        names: names of all steps.
        folder: folder that holds one folder per step.

    Returns:
        The configuration, and the names of the steps that it needs.
    """
    bare = config.model_copy(deep=True, update={"merge_method": _HIDDEN})
    texts: dict[int, ParameterSetting] = {}
    for place, scope in enumerate(scopes_of(bare)):
        if "calibration" in scope.settings:
            texts[place] = scope.settings["calibration"]
            scope.settings["calibration"] = _HIDDEN
    found, used = stock(bare, names, folder)
    for place, scope in enumerate(scopes_of(found)):
        if place in texts:
            scope.settings["calibration"] = texts[place]
    return found.model_copy(update={"merge_method": config.merge_method}), used
