"""How every tensor is fitted, from the parameters that mergekit evaluated for it."""

from collections.abc import Collection, Sequence
from functools import lru_cache

from mergekit.common import ModelReference, dtype_from_name

from mergekit_dam.coefficients.parametrisation import Parametrisation
from mergekit_dam.coefficients.tensors import TensorSettings, TensorSpec
from mergekit_dam.errors import ConfigError
from mergekit_dam.host.compat import ExecuteMergeMethodTask, WeightInfo
from mergekit_dam.host.prepare import Prepared
from mergekit_dam.parameters import TensorParameters


def tensor_spec(
    weight: WeightInfo,
    task: ExecuteMergeMethodTask,
    order: Sequence[ModelReference],
    prepared: Prepared,
    out_dtype: str | None,
    teaching: Collection[ModelReference],
) -> TensorSpec:
    """How one tensor is fitted.

    Args:
        weight: the tensor, in mergekit's definition of the architecture.
        task: mergekit's task that would merge it, with the evaluated parameters.
        order: all sources; a slice may list them in another order, or only some of them.
        prepared: the checked configuration.
        out_dtype: name of the dtype in which tensors are written, if it is configured.
        teaching: models that are read for this tensor but not merged.

    Raises:
        ConfigError: `weight`, or `loss_weight`, is 0 for every model.
    """
    shared = task.parameters
    base = order.index(task.base_model) if task.base_model in order else None
    listed = [model for model in task.model_order if model not in teaching]
    left_out = frozenset(index for index, model in enumerate(order) if model not in listed)
    include_base = prepared.run.include_base
    weights = [_own(task, model, "weight") for model in order]
    merged = [i for i in range(len(order)) if i not in left_out and (i != base or include_base)]
    if len(listed) > 1 and not sum(weights[i] for i in merged):
        raise ConfigError(
            f"{weight.name}: every model has `weight: 0`; the average to start from needs one"
        )
    calibrated = [_own(task, model, "loss_weight") for model in prepared.calibration]
    if calibrated and not sum(calibrated):
        raise ConfigError(
            f"{weight.name}: every model has `loss_weight: 0`; at least one must count in the fit"
        )
    settings = TensorSettings(
        parametrisation=_parametrisation(
            tuple(weights), base, include_base, shared["sum_to_one"], left_out
        ),
        loss_weights=tuple(_own(task, model, "loss_weight") for model in order),
        **{name: shared[name] for name in TensorParameters.model_fields},
    )
    written = dtype_from_name(weight.force_dtype or out_dtype)
    return TensorSpec(weight.name, settings, written)


def _own(task: ExecuteMergeMethodTask, model: ModelReference, name: str) -> float:
    """A model's parameter for one tensor; 0 if the tensor does not involve the model."""
    if model not in task.model_order:
        return 0.0
    value: float = task.input_parameters[model][name]
    return value


@lru_cache(maxsize=64)
def _parametrisation(
    weights: tuple[float, ...],
    base: int | None,
    include_base: bool,
    sum_to_one: bool,
    left_out: frozenset[int],
) -> Parametrisation:
    """Cached: tensors with equal parameters share one object, however many layers there are."""
    return Parametrisation.create(
        weights, base=base, include_base=include_base, sum_to_one=sum_to_one, left_out=left_out
    )
