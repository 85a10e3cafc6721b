"""Registers `dam` and hooks mergekit's planner and entry point.

The only file that touches mergekit's insides. It is called with each module of mergekit as
that is imported (see `autoload`), or explicitly by `install`.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

_MARK = "_mergekit_dam"
"""Attribute of what is hooked already: hooking twice does nothing."""


def on_import(module: ModuleType) -> None:
    """Hook a module of mergekit that has just been imported; idempotent."""
    hooks: dict[str, Callable[[Any], None]] = {
        "mergekit.merge_methods": _register,
        "mergekit.plan": _hook_planner,
        "mergekit.merge": _hook_run_merge,
    }
    hooks[module.__name__](module)


def install() -> None:
    """Import mergekit and hook it, where the import hook cannot reach."""
    for name in ("mergekit.merge_methods", "mergekit.plan", "mergekit.merge"):
        on_import(importlib.import_module(name))


def _register(merge_methods: Any) -> None:
    from mergekit_dam.method import NAME, DamMerge

    if NAME not in {method.spec.name for method in merge_methods.registered_methods()}:
        merge_methods.register(DamMerge())


def _hook_planner(plan: Any) -> None:
    """Have the planner of a dam merge plan stages in place of single tensors."""
    planner = plan.MergePlanner
    stock = planner.plan_to_disk
    if hasattr(stock, _MARK):
        return

    @functools.wraps(stock)
    def plan_to_disk(self: Any, out_path: str) -> Any:
        from mergekit_dam.method import NAME

        if self.config.merge_method != NAME:
            return stock(self, out_path)
        from mergekit_dam.graph import build_graph
        from mergekit_dam.prepare import PreparedConfiguration, prepare

        config = self.config
        if isinstance(config, PreparedConfiguration):
            prepared = config.prepared
        else:
            prepared = prepare(config, self.options)
        parameters = config.parameters or {}
        artifacts = []

        def _plan() -> None:
            planner._plan(self)
            graph = build_graph(
                self._tensors,
                prepared,
                config=self.out_model_config,
                options=self.options,
                out_dtype=config.out_dtype,
                parameters=parameters,
                out_path=Path(out_path),
            )
            self._tensors = graph.tensors
            artifacts.append(graph.artifacts)

        self._plan = _plan  # the stock method calls it, and saves what it planned
        try:
            return [*stock(self, out_path), *artifacts]
        finally:
            del self._plan

    setattr(plan_to_disk, _MARK, True)
    planner.plan_to_disk = plan_to_disk


def _hook_run_merge(merge: Any) -> None:
    """Check a dam configuration before mergekit downloads, converts or reads anything."""
    stock = merge.run_merge
    if hasattr(stock, _MARK):
        return

    @functools.wraps(stock)
    def run_merge(
        merge_config: Any, out_path: str, options: Any, config_source: str | None = None
    ) -> Any:
        from mergekit_dam.method import NAME

        if merge_config.merge_method != NAME:
            return stock(merge_config, out_path, options, config_source)
        from mergekit_dam.prepare import PreparedConfiguration, prepare

        source = yaml.safe_load(config_source) if config_source else None
        prepared = prepare(merge_config, options, source)
        config = PreparedConfiguration.create(merge_config, prepared)
        with _no_half_written_model(Path(out_path)):
            return stock(config, out_path, options, config_source or merge_config.to_yaml())

    setattr(run_merge, _MARK, True)
    merge.run_merge = run_merge


@contextmanager
def _no_half_written_model(out_path: Path) -> Iterator[None]:
    """Remove what an interrupted merge wrote, and the folder if it made it."""
    existed = out_path.is_dir()
    before = set(out_path.iterdir()) if existed else set()
    try:
        yield
    except BaseException:
        for file in set(out_path.iterdir()) - before if out_path.is_dir() else ():
            if file.is_file():
                file.unlink()
        if not existed and out_path.is_dir() and not any(out_path.iterdir()):
            out_path.rmdir()
        raise
