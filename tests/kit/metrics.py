"""Metrics of made-up gradients."""

import torch
from torch import Tensor

from mergekit_dam.fitting.metric import PLAIN, Metric
from tests.kit.tensors import randn

OUT, IN = 6, 7
TOKENS = {"as a matrix": 40, "as gradients": 4}
"""Tokens whose gradients make a metric: more than outputs, or fewer."""


def metric_of(kind: str, seed: int = 0, out: int = OUT) -> Metric:
    """A metric that is far from the plain one."""
    gradients = randn(TOKENS[kind], out, seed=100 + seed) * torch.linspace(0.1, 3, out)
    return Metric.of_gradients(gradients)


def dense(metric: Metric, out: int = OUT) -> Tensor:
    """The matrix S of a metric."""
    return metric(torch.eye(out, dtype=torch.float64))


DOMAINS: dict[str, list[str | None]] = {
    "matrices": ["as a matrix", "as a matrix"],
    "gradients": ["as gradients", "as gradients"],
    "one of each and a plain one": ["as a matrix", "as gradients", None],
}


def metrics_of(domains: str) -> list[Metric]:
    return [
        PLAIN if kind is None else metric_of(kind, seed)
        for seed, kind in enumerate(DOMAINS[domains])
    ]
