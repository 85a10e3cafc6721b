"""Registers `dam` and hooks mergekit's planner and entry point.

The only file that touches mergekit's insides. It is called with each module of mergekit as
that is imported (see `autoload`), or explicitly by `install`.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from mergekit_dam.host.output import output_folder
from mergekit_dam.host.planner import MARK, hook_planner

LOG = logging.getLogger(__name__)


def on_import(module: ModuleType) -> None:
    """Hook a module of mergekit that has just been imported; idempotent."""
    hooks: dict[str, Callable[[Any], None]] = {
        "mergekit.merge_methods": _register,
        "mergekit.plan": hook_planner,
        "mergekit.merge": _hook_run_merge,
        "mergekit.scripts.multimerge": _hook_steps,
    }
    hooks[module.__name__](module)


def install() -> None:
    """Import mergekit and hook it, where the import hook cannot reach."""
    for name in ("mergekit.merge_methods", "mergekit.plan", "mergekit.merge"):
        on_import(importlib.import_module(name))


def _register(merge_methods: Any) -> None:
    from mergekit_dam.request.method import NAME, DamMerge

    if NAME not in {method.spec.name for method in merge_methods.registered_methods()}:
        merge_methods.register(DamMerge())


def _hook_run_merge(merge: Any) -> None:
    """Check a dam configuration before mergekit downloads, converts or reads anything."""
    stock = merge.run_merge
    if hasattr(stock, MARK):
        return

    @functools.wraps(stock)
    def run_merge(
        merge_config: Any, out_path: str, options: Any, config_source: str | None = None
    ) -> Any:
        from mergekit_dam.request.method import NAME

        if merge_config.merge_method != NAME:
            return stock(merge_config, out_path, options, config_source)
        from mergekit_dam.request.prepare import PreparedConfiguration, prepare
        from mergekit_dam.streams import distributed

        source = yaml.safe_load(config_source) if config_source else None
        with distributed.joined_processes(options) as own:
            # One process reads the text: it need not lie on every machine, nor be one there.
            prepared = distributed.from_first(lambda: prepare(merge_config, own, source))
            config = PreparedConfiguration.create(merge_config, prepared)
            if distributed.size() > 1:
                distributed.in_turn(lambda: _merge_adapters(config, own))
            first = distributed.is_first()
            with _card_without_hub(), output_folder(Path(out_path), written=first) as folder:
                stock(config, str(folder), own, config_source or merge_config.to_yaml())

    setattr(run_merge, MARK, True)
    merge.run_merge = run_merge


def _hook_steps(multimerge: Any) -> None:
    """Have mergekit-multi leave alone what in a dam step is no other step, whatever its name."""
    stock = multimerge.patched_config
    if hasattr(stock, MARK):
        return

    @functools.wraps(stock)
    def patched_config(config: Any, merge_names: Any, working_dir: str) -> Any:
        from mergekit_dam.host.steps import patched
        from mergekit_dam.request.method import NAME

        if config.merge_method != NAME:
            return stock(config, merge_names, working_dir)
        return patched(stock, config, merge_names, working_dir)

    setattr(patched_config, MARK, True)
    multimerge.patched_config = patched_config


def _merge_adapters(config: Any, options: Any) -> None:
    """Do what mergekit does with adapters at its start: it takes a folder half full for full."""
    for model in config.referenced_models():
        model.merged(options.lora_merge_cache, options.trust_remote_code, options.lora_merge_dtype)


@contextmanager
def _card_without_hub() -> Iterator[None]:
    """Have mergekit's model card take a folder for a folder where the Hub cannot be asked.

    `models/a` may be a folder or the id of a model. mergekit asks the Hub after the merge, and
    where there is no connection, would fail then.
    """
    card: Any = importlib.import_module("mergekit.card")
    stock = card.is_hf

    def is_hf(path: str) -> bool:
        try:
            found: bool = stock(path)
        except Exception as error:  # of any HTTP client
            LOG.info("the Hub cannot tell whether it has %s (%s); there is a folder", path, error)
            return False
        return found

    card.is_hf = is_hf
    try:
        yield
    finally:
        card.is_hf = stock
