"""Differentiable Adaptive Merging (arXiv 2410.08371) as a merge method of mergekit.

What is named here is the public interface for Python; everything else may change at any time.

merge, plan, evaluate, report   what the commands of these names do
Coefficients                    the learned coefficients of a merge
DamError                        base of every error that is raised on purpose

Importing this package loads none of it, for every Python process of the environment does so: a
name is imported when it is used first.
"""

__version__ = "0.2.0"
__all__ = ["Coefficients", "DamError", "evaluate", "merge", "plan", "report"]

TYPE_CHECKING = False  # type checkers treat this name as they treat typing's
if TYPE_CHECKING:
    from mergekit_dam.api.coefficients import Coefficients
    from mergekit_dam.api.evaluating import evaluate
    from mergekit_dam.api.merging import merge, plan
    from mergekit_dam.api.reporting import report
    from mergekit_dam.errors import DamError

_PLACES = {
    "Coefficients": "api.coefficients",
    "DamError": "errors",
    "evaluate": "api.evaluating",
    "merge": "api.merging",
    "plan": "api.merging",
    "report": "api.reporting",
}
"""Public name -> the module that it is imported from."""


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
