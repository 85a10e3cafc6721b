"""Made-up sources and evidence for fits of single tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_dam.coefficients.parametrisation import Parametrisation
from mergekit_dam.coefficients.tensors import TensorSettings, TensorSources
from mergekit_dam.fitting.evidence import Evidence
from mergekit_dam.fitting.features import FeatureMoments
from mergekit_dam.fitting.metric import PLAIN, Metric
from mergekit_dam.fitting.moments import InputMoments, LinearMoments
from tests.kit.tensors import CPU, randn

MODELS = 3
TINY = 1e-9

FORMS = {
    "affine": Parametrisation.create(
        [1.0] * MODELS, base=None, include_base=False, sum_to_one=True
    ),
    "task vectors": Parametrisation.create(
        [1.0] * MODELS, base=1, include_base=False, sum_to_one=True
    ),
    "free": Parametrisation.create([1.0] * MODELS, base=None, include_base=False, sum_to_one=False),
}


def sources_of(
    tensors: Sequence[Tensor],
    *,
    form: str = "affine",
    ridge: float = TINY,
    granularity: str = "column",
    correction: str = "none",
    loss_weights: Sequence[float] = (1.0,) * MODELS,
    dtype: torch.dtype = torch.float32,
) -> TensorSources:
    settings = TensorSettings(
        parametrisation=FORMS[form],
        loss_weights=tuple(loss_weights),
        ridge=ridge,
        granularity=granularity,
        correction=correction,
        embeddings=True,
        norms=True,
        head=True,
    )
    return TensorSources("block.weight", tensors, settings, dtype)


def truth(form: str, columns: int) -> Tensor:
    """Coefficients that the form can reach, other than its start."""
    unknowns = randn(len(FORMS[form].start), columns, seed=7).double()
    return FORMS[form].coefficients(FORMS[form].start[:, None] + 0.5 * unknowns)


def moments_of(x: Tensor, y: Tensor, metric: Metric = PLAIN) -> LinearMoments:
    """Sums over all tokens, each of weight one."""
    own = LinearMoments.zeros(y.shape[1], InputMoments.zeros(x.shape[1], CPU), metric)
    own.inputs.add(x, torch.ones(len(x)))
    own.add(x, y, y, torch.ones(len(x)))
    return own


def linear_evidence(
    x: Tensor, y: Tensor, held_out: tuple[Tensor, Tensor] | None = None
) -> Evidence[LinearMoments]:
    """Evidence of one model's data, weighted as `gather` weights it."""

    def scaled(x: Tensor, y: Tensor) -> LinearMoments:
        moments = moments_of(x, y)
        return moments.scaled(1 / float(moments.energy))

    fit = scaled(x, y)
    return Evidence([fit], [fit if held_out is None else scaled(*held_out)], 1.0)


def evidence_of_domains(
    domains: Sequence[tuple[Tensor, Tensor, Metric]],
) -> Evidence[LinearMoments]:
    """Evidence of inputs, outputs and the metric of every domain."""
    terms = [moments_of(x, y, metric) for x, y, metric in domains]
    for term in terms:
        term.scale = 1 / float(term.energy)
    return Evidence(terms, terms, float(len(domains)))


def feature_evidence(n: Tensor, y: Tensor) -> Evidence[FeatureMoments]:
    own = FeatureMoments.zeros(n.shape[1], CPU)
    own.add(n, y, y, torch.ones(n.shape[0]))
    scaled = own.scaled(1 / float(own.energy))
    return Evidence([scaled], [scaled], 1.0)
