"""TODO mergekit_dam/host/planner.py."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARK = "_mergekit_dam"
"""Attribute of what is hooked already: hooking twice does nothing."""


def hook_planner(plan: Any) -> None:
    """Have the planner of a dam merge plan stages in place of single tensors."""
    planner = plan.MergePlanner
    stock = planner.plan_to_disk
    if hasattr(stock, MARK):
        return

    @functools.wraps(stock)
    def plan_to_disk(self: Any, out_path: str) -> Any:
        from mergekit_dam.request.method import NAME

        if self.config.merge_method != NAME:
            return stock(self, out_path)
        from mergekit.common import set_config_value

        from mergekit_dam.host.graph import build_graph
        from mergekit_dam.request.prepare import PreparedConfiguration, prepare
        from mergekit_dam.sources.gathers import KnownTokenizer
        from mergekit_dam.sources.loadable import Loadable
        from mergekit_dam.streams import distributed

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

        loadable = Loadable(self.arch_info, self.out_model_config)

        def plan_tensor(weight: Any, weights_in: Any, models: Any, cfg_reader: Any) -> None:
            weight, weights_in = loadable.required(weight, weights_in, models)
            planner.plan_tensor(self, weight, weights_in, models, cfg_reader)

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

        # The stock method calls them, and saves what was planned.
        self._plan, self.plan_tensor = _plan, plan_tensor
        try:
            planned = [*stock(self, out_path), *artifacts]
        finally:
            del self._plan, self.plan_tensor
        if distributed.is_first():
            return planned
        return [written.last for written in artifacts if written.last is not None]

    setattr(plan_to_disk, MARK, True)
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
    from mergekit_dam.request.prepare import all_models
    from mergekit_dam.sources.slices import TaughtSlice, taught

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
        del planner.normalize_config
        planner.plan_tensor = plan_tensor


def _stacked_layers(planner: Any) -> dict[Any, tuple[int, ...]]:
    """The layers of every model in the merged one, whose configuration is made to fit them."""
    from mergekit_dam.sources.slices import follow, stacks

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
