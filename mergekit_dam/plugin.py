"""Registers `dam` and hooks mergekit's planner and entry point.

The only file that touches mergekit's insides. It is called with each module of mergekit as
that is imported (see `autoload`), or explicitly by `install`.
"""

import functools
import importlib
import logging
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

LOG = logging.getLogger(__name__)

SCRATCH = ".dam-"
"""Beginning of the names of folders that do not outlive a merge."""

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
        from mergekit.common import set_config_value

        from mergekit_dam import distributed
        from mergekit_dam.graph import build_graph
        from mergekit_dam.prepare import PreparedConfiguration, prepare
        from mergekit_dam.tasks import KnownTokenizer

        config = self.config
        if isinstance(config, PreparedConfiguration):
            prepared = config.prepared
        else:
            prepared = prepare(config, self.options)
        if prepared.vocabulary is not None:
            self._tokenizer_task = KnownTokenizer(
                **dict(self._tokenizer_task), vocabulary=prepared.vocabulary
            )
        key = self.arch_info.vocab_size_config_key or "vocab_size"
        if prepared.rows is not None:  # mergekit leaves those of the base there
            set_config_value(self.out_model_config, key, prepared.rows)
        elif prepared.vocabulary is not None:
            prepared.vocabulary.tell(self.out_model_config, key)
        parameters = config.parameters or {}
        artifacts = []

        def _plan() -> None:
            with _teachers_in_slices(self, prepared) as teaching:
                planner._plan(self)
            layers = _stacked_layers(self)
            graph = build_graph(
                self._tensors,
                prepared,
                config=self.out_model_config,
                options=self.options,
                out_dtype=config.out_dtype,
                parameters=parameters,
                out_path=Path(out_path),
                teaching=teaching,
                stacks=layers,
            )
            self._tensors = graph.tensors
            artifacts.append(graph.artifacts)

        self._plan = _plan  # the stock method calls it, and saves what it planned
        try:
            planned = [*stock(self, out_path), *artifacts]
        finally:
            del self._plan
        if distributed.is_first():
            return planned
        return [written.last for written in artifacts if written.last is not None]

    setattr(plan_to_disk, _MARK, True)
    planner.plan_to_disk = plan_to_disk


@contextmanager
def _teachers_in_slices(planner: Any, prepared: Any) -> Iterator[dict[str, frozenset[Any]]]:
    """Have a planner read, for every slice, the layers of models that teach and are not listed.

    Embeddings that are aligned to a common vocabulary are read of all models: mergekit takes those
    of a token that a model lacks from the others (or cuts all to the rows of the smallest), and a
    replay, which has no teachers, must too.

    Yields:
        By output tensor, the models that are read for it and not merged; filled by the plan.
    """
    from mergekit_dam.prepare import all_models
    from mergekit_dam.slices import TaughtSlice, taught

    everybody = all_models(prepared.checked)
    normalize, plan_tensor = planner.normalize_config, planner.plan_tensor
    teaching: dict[str, frozenset[Any]] = {}

    def normalize_config() -> None:
        normalize()
        planner.config.modules = {
            name: module.model_copy(update={"slices": taught(module.slices, prepared.calibration)})
            for name, module in planner.config.modules.items()
        }

    def plan_with_all(weight: Any, weights_in: Any, models: Any, cfg_reader: Any) -> None:
        # Outside of the layers mergekit lists a weight once per source of the first slice.
        if len(weights_in) != len(models):
            weights_in = [weights_in[0]] * len(models)
        assert isinstance(cfg_reader.slice_out, TaughtSlice)
        others = []
        aligned = planner._tokenizer_task or planner.options.unsafe_truncate_embeddings
        if aligned and weight.vocabulary_axis is not None:
            others = [model for model in everybody if model not in models]
        weights_in = [*weights_in, *weights_in[:1] * len(others)]
        plan_tensor(weight, weights_in, [*models, *others], cfg_reader)
        teaching[weight.name] = cfg_reader.slice_out.teaching.union(others)

    planner.normalize_config, planner.plan_tensor = normalize_config, plan_with_all
    try:
        yield teaching
    finally:
        del planner.normalize_config, planner.plan_tensor


def _stacked_layers(planner: Any) -> dict[Any, tuple[int, ...]]:
    """The layers of every model in the merged one, whose configuration is made to fit them."""
    from mergekit_dam.slices import follow, stacks

    modules = list(planner.config.modules.values())
    if len(modules) > 1:
        return {}  # several towers, each with a stack of its own
    layers = stacks(modules[0].slices)
    donor = planner.config.base_model or planner.config.referenced_models()[0]
    own = donor.config(trust_remote_code=planner.options.trust_remote_code)
    first = [i for entry in modules[0].slices for i in range(*entry.sources[0].layer_range)]
    stack = layers.get(donor, first)
    if list(stack) != list(range(own.get_text_config().num_hidden_layers)):
        follow(planner.out_model_config, own, stack)
    return layers


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
        from mergekit_dam import distributed
        from mergekit_dam.prepare import PreparedConfiguration, prepare

        source = yaml.safe_load(config_source) if config_source else None
        with distributed.joined(options) as own:
            # One process reads the text: it need not lie on every machine, nor be one there.
            prepared = distributed.from_first(lambda: prepare(merge_config, own, source))
            config = PreparedConfiguration.create(merge_config, prepared)
            if distributed.size() > 1:
                distributed.in_turn(lambda: _merge_adapters(config, own))
            first = distributed.is_first()
            with _card_without_hub(), _output(Path(out_path), written=first) as folder:
                stock(config, str(folder), own, config_source or merge_config.to_yaml())

    setattr(run_merge, _MARK, True)
    merge.run_merge = run_merge


def _hook_steps(multimerge: Any) -> None:
    """Have mergekit-multi leave alone what in a dam step is no other step, whatever its name."""
    stock = multimerge.patched_config
    if hasattr(stock, _MARK):
        return

    @functools.wraps(stock)
    def patched_config(config: Any, merge_names: Any, working_dir: str) -> Any:
        from mergekit_dam.method import NAME
        from mergekit_dam.steps import patched

        if config.merge_method != NAME:
            return stock(config, merge_names, working_dir)
        return patched(stock, config, merge_names, working_dir)

    setattr(patched_config, _MARK, True)
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


@contextmanager
def _output(out_path: Path, *, written: bool) -> Iterator[Path]:
    """Where a merge goes: to its folder, or to one that is thrown away."""
    if written:
        with _no_half_written_model(out_path):
            yield out_path
        return
    beside = out_path.absolute().parent  # the fit needs a disk with room, as that one has
    with (
        _terminable(),
        tempfile.TemporaryDirectory(
            prefix=SCRATCH, dir=beside if beside.is_dir() else None
        ) as folder,
    ):
        yield Path(folder)


@contextmanager
def _no_half_written_model(out_path: Path) -> Iterator[None]:
    """Remove what an interrupted merge wrote, and the folder if it made it."""
    existed = out_path.is_dir()
    before = set(out_path.iterdir()) if existed else set()
    with _terminable() as uninterrupted:
        try:
            yield
        except BaseException:
            uninterrupted()
            for entry in set(out_path.iterdir()) - before if out_path.is_dir() else ():
                if entry.is_file():
                    entry.unlink()
                elif entry.name.startswith(SCRATCH):
                    shutil.rmtree(entry)
            if not existed and out_path.is_dir() and not any(out_path.iterdir()):
                out_path.rmdir()
            raise


@contextmanager
def _terminable() -> Iterator[Callable[[], None]]:
    """Have SIGTERM end the process the way ctrl-c does, through everything that cleans up.

    torchrun sends it to the processes of a merge when one of them has stopped.

    Yields:
        What has SIGTERM ignored from then on.
    """
    stock = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or stock != signal.SIG_DFL:
        yield lambda: None
        return

    def stop(number: int, _: Any) -> None:
        ignore()
        raise SystemExit(128 + number)

    def ignore() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield ignore
    finally:
        signal.signal(signal.SIGTERM, stock)
