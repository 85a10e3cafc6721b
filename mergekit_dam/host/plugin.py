"""Registers `dam`, and makes mergekit call this package where it plans and runs a dam merge.

`autoload` calls `on_import` for each module of mergekit when it is imported; `install` does so
explicitly. mergekit is only half imported then, so the hooks import this package when called.
"""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from mergekit_dam.parameters import NAME

_MARK = "_mergekit_dam"
"""Attribute of functions that are hooked already: hooking twice does nothing."""


def on_import(module: ModuleType) -> None:
    """Hook a module of mergekit that has just been imported; idempotent."""
    hooks: dict[str, Callable[[Any], None]] = {
        "mergekit.merge_methods": _register,
        "mergekit.plan": _hook_planner,
        "mergekit.merge": _hook_run_merge,
        "mergekit.scripts.run_yaml": _hook_command,
        "mergekit.scripts.multimerge": _hook_multi,
    }
    hooks[module.__name__](module)


def install() -> None:
    """Import mergekit and hook it, where the import hook does not reach."""
    for name in ("mergekit.merge_methods", "mergekit.plan", "mergekit.merge"):
        on_import(importlib.import_module(name))


def run_merge(*args: Any, **kwargs: Any) -> None:
    """Mergekit's `run_merge`, hooked: also where the import hook does not reach."""
    install()
    importlib.import_module("mergekit.merge").run_merge(*args, **kwargs)


def _register(merge_methods: Any) -> None:
    from mergekit_dam.request.method import DamMerge

    if NAME not in {method.spec.name for method in merge_methods.registered_methods()}:
        merge_methods.register(DamMerge())


def _hook_planner(plan: Any) -> None:
    """Make the planner of a dam merge plan stages in place of single tensors."""

    def plan_to_disk(stock: Callable[..., Any], planner: Any, out_path: str) -> Any:
        if planner.config.merge_method != NAME:
            return stock(planner, out_path)
        from mergekit_dam.host.planner import plan_stages

        return plan_stages(planner, lambda: stock(planner, out_path), Path(out_path))

    _replace(plan.MergePlanner, "plan_to_disk", plan_to_disk)


def _hook_run_merge(merge: Any) -> None:
    """Check a dam merge before mergekit starts it, and clean up after it."""

    def run_merge(stock: Callable[..., Any], merge_config: Any, *args: Any, **kwargs: Any) -> Any:
        if merge_config.merge_method != NAME:
            return stock(merge_config, *args, **kwargs)
        from mergekit_dam.host.run import run_dam

        return run_dam(stock, merge_config, *args, **kwargs)

    def model_validate(stock: Callable[..., Any], values: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(values, dict) or values.get("merge_method") != NAME:
            return stock(values, *args, **kwargs)
        from mergekit_dam.request.entries import without_entries

        return stock(without_entries(values), *args, **kwargs)

    _replace(merge, "run_merge", run_merge)
    _replace(merge.MergeConfiguration, "model_validate", model_validate)


def _hook_command(run_yaml: Any) -> None:
    """Check the file of mergekit-yaml, whose own parsing ends in tracebacks."""
    _check_file_of(run_yaml.main, several=False)


def _hook_multi(multimerge: Any) -> None:
    """Check the file of mergekit-multi, and leave values alone that only look like its steps."""
    _check_file_of(multimerge.main, several=True)

    def patched_config(
        stock: Callable[..., Any], config: Any, merge_names: Any, working_dir: str
    ) -> Any:
        if config.merge_method != NAME:
            return stock(config, merge_names, working_dir)
        from mergekit_dam.host.steps import patched

        return patched(stock, config, merge_names, working_dir)

    _replace(multimerge, "patched_config", patched_config)


def _check_file_of(command: Any, *, several: bool) -> None:
    """Make a click command refuse a file in which a dam configuration is wrong."""

    def callback(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from mergekit_dam.host.names import naming
        from mergekit_dam.request.reading import refuse_unreadable

        file = Path(kwargs["config_file"])
        refuse_unreadable(file, several=several)
        with naming(file.parent if file.is_file() else None):
            return stock(*args, **kwargs)

    _replace(command, "callback", callback)


def _replace(owner: Any, name: str, own: Callable[..., Any]) -> None:
    """Replace a function of mergekit's by one that gets the original as its first argument."""
    stock = getattr(owner, name)
    if hasattr(stock, _MARK):
        return

    @functools.wraps(stock)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return own(stock, *args, **kwargs)

    setattr(replaced, _MARK, True)
    setattr(owner, name, replaced)
