"""Registers `dam`, and has mergekit call us where it plans and runs a dam merge.

It is called with each module of mergekit as that is imported (see `autoload`), or explicitly by
`install`. mergekit is half imported at that moment, so the hooks import our code when called.
"""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from mergekit_dam.parameters import NAME

_MARK = "_mergekit_dam"
"""Attribute of what is hooked already: hooking twice does nothing."""


def on_import(module: ModuleType) -> None:
    """Hook a module of mergekit that has just been imported; idempotent."""
    hooks: dict[str, Callable[[Any], None]] = {
        "mergekit.merge_methods": _register,
        "mergekit.plan": _hook_planner,
        "mergekit.merge": _hook_run_merge,
        "mergekit.scripts.multimerge": _hook_steps,
    }
    hooks[module.__name__](module)


def install() -> None:
    """Import mergekit and hook it, where the import hook cannot reach."""
    for name in ("mergekit.merge_methods", "mergekit.plan", "mergekit.merge"):
        on_import(importlib.import_module(name))


def _register(merge_methods: Any) -> None:
    from mergekit_dam.request.method import DamMerge

    if NAME not in {method.spec.name for method in merge_methods.registered_methods()}:
        merge_methods.register(DamMerge())


def _hook_planner(plan: Any) -> None:
    """Have the planner of a dam merge plan stages in place of single tensors."""

    def plan_to_disk(stock: Callable[..., Any], planner: Any, out_path: str) -> Any:
        if planner.config.merge_method != NAME:
            return stock(planner, out_path)
        from mergekit_dam.host.planner import plan_stages

        return plan_stages(planner, lambda: stock(planner, out_path), Path(out_path))

    _replace(plan.MergePlanner, "plan_to_disk", plan_to_disk)


def _hook_run_merge(merge: Any) -> None:
    """Have a dam merge checked before mergekit starts it, and cleaned up after it."""

    def run_merge(stock: Callable[..., Any], merge_config: Any, *args: Any, **kwargs: Any) -> Any:
        if merge_config.merge_method != NAME:
            return stock(merge_config, *args, **kwargs)
        from mergekit_dam.host.run import run_dam

        return run_dam(stock, merge_config, *args, **kwargs)

    _replace(merge, "run_merge", run_merge)


def _hook_steps(multimerge: Any) -> None:
    """Have mergekit-multi leave alone what in a dam step is no other step, whatever its name."""

    def patched_config(
        stock: Callable[..., Any], config: Any, merge_names: Any, working_dir: str
    ) -> Any:
        if config.merge_method != NAME:
            return stock(config, merge_names, working_dir)
        from mergekit_dam.host.steps import patched

        return patched(stock, config, merge_names, working_dir)

    _replace(multimerge, "patched_config", patched_config)


def _replace(owner: Any, name: str, own: Callable[..., Any]) -> None:
    """Put a function in the place of one of mergekit's, which it gets as its first argument."""
    stock = getattr(owner, name)
    if hasattr(stock, _MARK):
        return

    @functools.wraps(stock)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return own(stock, *args, **kwargs)

    setattr(replaced, _MARK, True)
    setattr(owner, name, replaced)
