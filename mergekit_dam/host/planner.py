"""The plan of a dam merge: mergekit's planner plans stages in place of single tensors."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference, set_config_value
from mergekit.config import MergeConfiguration
from mergekit.graph import Task

from mergekit_dam.host.compat import MergePlanner, Planner
from mergekit_dam.host.gathers import KnownTokenizer
from mergekit_dam.host.graph import build_graph
from mergekit_dam.host.loadable import Loadable
from mergekit_dam.host.merge import Merge
from mergekit_dam.host.prepare import Prepared, PreparedConfiguration, all_models, prepare
from mergekit_dam.host.references import with_sources
from mergekit_dam.host.replay import identified
from mergekit_dam.host.tasks import WriteArtifacts
from mergekit_dam.parameters import UNRECORDED
from mergekit_dam.request.scopes import idle_filters
from mergekit_dam.sources.slices import TaughtSlice, follow, stacks, taught
from mergekit_dam.streams import distributed

LOG = logging.getLogger(__name__)


def plan_stages(
    stock: Any, stock_plan: Callable[[], list[Task[Any]]], out_path: Path
) -> list[Task[Any]]:
    """The tasks that write a merged model.

    Args:
        stock: mergekit's planner.
        stock_plan: mergekit's own `plan_to_disk`, which calls the methods replaced here.
        out_path: folder of the merged model.
    """
    planner, config = Planner(stock), stock.config
    carried = isinstance(config, PreparedConfiguration)
    if not carried:  # planned without `run_merge`
        config = stock.config = with_sources(config)
        checked = prepare(config, stock.options)
        prepared = identified(checked, all_models(checked.checked))
    else:
        prepared = config.prepared
    _adopt_vocabulary(planner, prepared)
    loadable = Loadable(stock.arch_info, stock.out_model_config)
    artifacts: list[WriteArtifacts] = []

    def plan_tensor(weight: Any, weights_in: Any, models: Any, cfg_reader: Any) -> None:
        weight, weights_in = loadable.required(weight, weights_in, models)
        MergePlanner.plan_tensor(stock, weight, weights_in, models, cfg_reader)

    def plan() -> None:
        with _teachers_in_slices(planner, prepared) as teaching:
            planner.plan()
        if prepared.replay is None:
            _warn_of_filters(config, [weight.name for weight, _ in planner.tensors])
        merge = Merge(
            prepared,
            config=stock.out_model_config,
            options=stock.options,
            out_dtype=config.out_dtype,
            parameters={k: v for k, v in (config.parameters or {}).items() if k not in UNRECORDED},
            out_path=out_path,
            stacks=_stacked_layers(stock),
        )
        graph = build_graph(planner.tensors, merge, teaching)
        planner.tensors = graph.tensors
        artifacts.append(graph.artifacts)

    with planner.replaced(_plan=plan, plan_tensor=plan_tensor):
        planned = [*stock_plan(), *artifacts]
    if distributed.is_first():
        return planned
    return [written.last for written in artifacts if written.last is not None]


def _warn_of_filters(config: MergeConfiguration, tensors: Sequence[str]) -> None:
    for parameter, filters in idle_filters(config, tensors).items():
        if distributed.is_first():
            LOG.warning(
                "`%s`: %s is in no tensor's name, so nothing is set there; a name is such as %s",
                parameter,
                " or ".join(f"`{own}`" for own in filters),
                tensors[len(tensors) // 2],
            )


def _adopt_vocabulary(planner: Planner, prepared: Prepared) -> None:
    """Make the plan use the vocabulary, or the number of rows, that the check has found."""
    stock = planner.stock
    key = stock.arch_info.vocab_size_config_key or "vocab_size"
    if prepared.vocabulary is not None:
        task = dict(planner.tokenizer_task or {})
        planner.tokenizer_task = KnownTokenizer(**task, vocabulary=prepared.vocabulary)
    if prepared.rows is not None:  # mergekit would keep the number of the base
        set_config_value(stock.out_model_config, key, prepared.rows)
    elif prepared.vocabulary is not None:
        prepared.vocabulary.tell(stock.out_model_config, key)


@contextmanager
def _teachers_in_slices(
    planner: Planner, prepared: Prepared
) -> Iterator[dict[str, frozenset[ModelReference]]]:
    """Make a planner read, for every slice, the layers of teachers that the slice does not list.

    Embeddings that are aligned to a common vocabulary are read from all models. If a model lacks a
    token, mergekit takes its embedding from the others (or it cuts all models to the rows of the
    smallest). A replay, which has no teachers, must read the same models to get the same rows.

    Yields:
        Output tensor -> the models that are read for it but not merged; the plan fills it.
    """
    stock, everybody = planner.stock, all_models(prepared.checked)
    normalize, plan_tensor = stock.normalize_config, stock.plan_tensor
    teaching: dict[str, frozenset[ModelReference]] = {}

    def normalize_config() -> None:
        normalize()
        stock.config.modules = {
            name: module.model_copy(update={"slices": taught(module.slices, prepared.calibration)})
            for name, module in stock.config.modules.items()
        }

    def plan_with_all(weight: Any, weights_in: Any, models: Any, cfg_reader: Any) -> None:
        # A weight after the layers: mergekit lists one per source of the first slice, not the last.
        if len(weights_in) != len(models):
            weights_in = [weights_in[0]] * len(models)
        assert isinstance(cfg_reader.slice_out, TaughtSlice)
        others = []
        aligned = planner.tokenizer_task or stock.options.unsafe_truncate_embeddings
        if aligned and weight.vocabulary_axis is not None:
            others = [model for model in everybody if model not in models]
        weights_in = [*weights_in, *weights_in[:1] * len(others)]
        plan_tensor(weight, weights_in, [*models, *others], cfg_reader)
        teaching[weight.name] = cfg_reader.slice_out.teaching.union(others)

    with planner.replaced(normalize_config=normalize_config, plan_tensor=plan_with_all):
        yield teaching


def _stacked_layers(stock: Any) -> dict[ModelReference, tuple[int, ...]]:
    """Every model's layers in the merged model; adapts the merged configuration to them."""
    modules = list(stock.config.modules.values())
    if len(modules) > 1:
        return {}  # several towers, each with a stack of its own
    layers = stacks(modules[0].slices)
    donor = stock.config.base_model or stock.config.referenced_models()[0]
    own = donor.config(trust_remote_code=stock.options.trust_remote_code)
    first = [i for entry in modules[0].slices for i in range(*entry.sources[0].layer_range)]
    stack = layers.get(donor, first)
    if list(stack) != list(range(own.get_text_config().num_hidden_layers)):
        follow(stock.out_model_config, own, stack)
    return layers
