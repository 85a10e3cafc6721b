"""Steps of mergekit-multi: what in a dam step is the name of another step, and what only looks so.

mergekit takes every value of a configuration that equals a step's name for the model that the step
writes, and puts its folder there. So `coefficients` and `start` may name an earlier dam step. But a
calibration is text, whatever its name, and a method is a method.
"""

from collections.abc import Callable, Collection

from mergekit.config import MergeConfiguration, ParameterSetting

from mergekit_dam.request.scopes import scopes_of

Patch = Callable[[MergeConfiguration, Collection[str], str], tuple[MergeConfiguration, set[str]]]

_HIDDEN = "(hidden)"
"""Stands in place of what may be a step's name and is none; no step is called so."""


def patched(
    stock: Patch, config: MergeConfiguration, names: Collection[str], folder: str
) -> tuple[MergeConfiguration, set[str]]:
    """Put the folders of steps in place of their names, as mergekit does, in a dam step.

    Args:
        stock: mergekit's function that does so.
        names: of all steps.
        folder: that holds a folder for each step.

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
