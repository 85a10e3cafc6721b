"""A dam merge around mergekit's own `run_merge`: checks before it, clean-up after it."""

import importlib
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_dam.digests import hashed_ahead
from mergekit_dam.display.choose import displayed
from mergekit_dam.display.noise import without_noise
from mergekit_dam.errors import DamError, first_line
from mergekit_dam.host.card import hub_ids, is_hub_id
from mergekit_dam.host.complete import check_complete, tokenizer_must_be_copied
from mergekit_dam.host.failures import mergekit_errors
from mergekit_dam.host.identities import weight_files
from mergekit_dam.host.lock import write_lock
from mergekit_dam.host.names import Names
from mergekit_dam.host.output import kept_beside, output_folder
from mergekit_dam.host.phases import CHECK
from mergekit_dam.host.prepare import Prepared, PreparedConfiguration, prepare
from mergekit_dam.host.references import open_sources, with_sources
from mergekit_dam.host.replay import identified
from mergekit_dam.host.resume import open_journal
from mergekit_dam.host.told import beginning, ending
from mergekit_dam.host.tracked import tracked
from mergekit_dam.host.workplace import SCRATCH
from mergekit_dam.model.checkpoint import check_checkpoint
from mergekit_dam.repeatable import repeatable
from mergekit_dam.reports.card import complete_card
from mergekit_dam.request.document import single
from mergekit_dam.streams import distributed, progress
from mergekit_dam.threads import own_share

LOG = logging.getLogger(__name__)


def run_dam(
    stock: Callable[..., Any],
    merge_config: MergeConfiguration,
    out_path: str,
    options: MergeOptions,
    config_source: str | None = None,
    approve: Callable[[Prepared], None] | None = None,
    lasting: bool = True,
) -> None:
    """Check a dam configuration before mergekit downloads, converts or reads anything; merge.

    Args:
        stock: mergekit's own `run_merge`; the arguments up to `config_source` are its arguments.
        approve: looks at what was prepared, and raises where the merge is not to go on.
        lasting: whether the folder stays, and a user is told what to do with it.
    """
    document = single(config_source) if config_source else None
    with (
        own_share(),
        repeatable(),
        mergekit_errors(),
        without_noise(),
        distributed.joined_processes(options) as own,
        displayed(quiet=own.quiet),
    ):
        models = with_sources(merge_config)
        with output_folder(Path(out_path), models.referenced_models()) as folder:
            # One process reads the text: others may lack it, or have another version.
            prepared = distributed.from_first(lambda: prepare(models, own, document))
            if approve is not None:
                approve(prepared)
            place = kept_beside(folder).parent
            for line in beginning(prepared, Path(out_path), place, lasting=lasting):
                progress.say(line)
            config = PreparedConfiguration.create(models, prepared)
            tree = yaml.safe_load(merge_config.to_yaml()) if document is None else document.tree
            _check_downloaded(config, own)
            with (
                _card_without_hub(),
                _short_of_memory(),
                tokenizer_must_be_copied(),
                _adapter_cache(config, own, folder) as kept,
            ):
                distributed.in_turn(lambda: open_sources(config.referenced_models(), kept))
                with _hashed_ahead(config):
                    known = identified(prepared, config.referenced_models())
                    config = PreparedConfiguration.create(config, known)
                    if distributed.is_first():
                        config.keep(open_journal(kept_beside(folder), config, own))
                    silent = kept.model_copy(update={"quiet": True})  # its bar would stand still
                    source = config_source or merge_config.to_yaml()
                    with tracked(prepared, tree, folder, quiet=own.quiet):
                        stock(config, str(folder), silent, source)
            if distributed.is_first():
                _finish(folder, config, tree, own)
        if distributed.is_first():
            for line in ending(Path(out_path), lasting=lasting):
                progress.say(line)


def _finish(folder: Path, config: PreparedConfiguration, tree: Any, options: MergeOptions) -> None:
    """Complete the model card, check that all files are there, and write the lock.

    Args:
        tree: the configuration as it was written, as plain values.
    """
    progress.begin(CHECK)
    _name_paths(folder / "README.md", config.prepared.names)
    if options.write_model_card:
        complete_card(folder, hub_ids(config.referenced_models()))
    check_complete(folder, options, tokenizer=config.prepared.vocabulary is not None)
    write_lock(folder, config, tree, options)


@contextmanager
def _hashed_ahead(config: MergeConfiguration) -> Iterator[None]:
    """Hash the models' weights in the first process while it merges them."""
    models = config.referenced_models() if distributed.is_first() else ()
    with hashed_ahead(file for model in models for file in weight_files(model).values()):
        yield


def _name_paths(card: Path, names: Names) -> None:
    """Put names in the place of paths of this machine in the model card, if there is one."""
    if card.is_file():
        card.write_text(names.text(card.read_text("utf-8")), encoding="utf-8")


@contextmanager
def _adapter_cache(
    config: MergeConfiguration, options: MergeOptions, out_path: Path
) -> Iterator[MergeOptions]:
    """Options with a folder for merged adapters: a temporary one, unless the options name one."""
    adapters = any(model.lora is not None for model in config.referenced_models())
    if options.lora_merge_cache or not adapters:
        yield options
        return
    beside = str((out_path / f"{SCRATCH}adapters").absolute())
    folder = distributed.from_first(lambda: beside)
    try:
        yield options.model_copy(update={"lora_merge_cache": folder})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_downloaded(config: MergeConfiguration, options: MergeOptions) -> None:
    """Download what is on the Hub, as mergekit does next, and check its files."""
    for model in config.referenced_models():
        if not Path(model.model.path).exists():
            path = model.local_path(options.transformers_cache, ignore_lora=True)
            check_checkpoint(Path(path))


@contextmanager
def _short_of_memory() -> Iterator[None]:
    """Say what to do where the GPU's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DamError(
            f"the GPU's memory does not suffice ({first_line(error)}). Let the merge use more "
            "(`gpu_memory`), or let it need less: `metric: identity` keeps no gradients, "
            "`objective: layer` needs less than a descent, and so do fewer models; or merge on the "
            "CPU, without `--cuda`"
        ) from error


@contextmanager
def _card_without_hub() -> Iterator[None]:
    """Make mergekit's model card take a path that is there for a folder.

    `models/a` may be a folder or the id of a model, and mergekit would ask the Hub.
    """
    card: Any = importlib.import_module("mergekit.card")
    stock = card.is_hf
    card.is_hf = is_hub_id
    try:
        yield
    finally:
        card.is_hf = stock
