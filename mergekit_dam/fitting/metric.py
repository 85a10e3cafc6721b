"""The metric in which the output error of a linear is measured.

Let `S = mean over tokens of g g^T`, where g is the gradient of a domain's loss at the linear's
output. Then `e^T S e` measures how much an error e matters to the loss: a Gauss-Newton
approximation of the KL with Kronecker factors (Martens & Grosse, arXiv 1503.05671). With `S = I`,
it is the plain squared error.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_dam.fitting.symmetric import add_products, mirror
from mergekit_dam.streams.distributed import all_rows, all_sum, all_sums

DAMPING = 1.0
"""Multiple of S's mean diagonal added to S's diagonal: few tokens do not show all gradients."""

FULL = 0.95
"""Fraction of the tokens whose gradients count in full."""


def kept_as_rows(tokens: float, out_features: int) -> bool:
    """Whether a metric is kept as the gradients of its tokens, not as a matrix `[out, out]`.

    Products with them are cheaper, and they take less room.
    """
    return 2 * tokens <= out_features


@dataclass(frozen=True)
class Metric:
    """A metric S on the outputs of one linear.

    Attributes:
        factors: S without `shift`, fp32: as the matrix `[out, out]`, or as fewer rows
            `[rows, out]` whose `rows^T rows` is the matrix; None for `S = I`.
        is_matrix: Whether `factors` is the matrix.
        shift: Multiple of the identity that is added.
    """

    factors: Tensor | None = None
    is_matrix: bool = False
    shift: float = 1.0

    @classmethod
    def of_gradients(cls, gradients: Tensor) -> "Metric":
        """The damped metric of gradients fp32 `[tokens, out]`, of all processes.

        It is kept as a matrix, or as the gradients if there are few of them. A token counts in
        full if its gradient's energy is at most the `FULL` quantile of all energies, else in
        inverse proportion to its energy. Otherwise one exploding gradient would determine S.
        """
        energy = energies(gradients)
        weighted = all_rows(energy[energy > 0])
        if not len(weighted):
            return cls()
        usual = weighted.sort().values[math.ceil(FULL * len(weighted)) - 1]
        weight = usual / energy.clamp_min(usual)
        share = weight / all_sum(weight.sum())
        rows = gradients * share.sqrt().to(gradients)[:, None]
        energy_in_all, tokens = all_sums([float(energy @ share), len(rows)])
        mean = energy_in_all / rows.shape[1]
        if kept_as_rows(tokens, rows.shape[1]):
            return cls(all_rows(rows), False, DAMPING * mean)
        matrix = rows.new_zeros(rows.shape[1], rows.shape[1])
        add_products(matrix, rows)
        matrix = all_sum(matrix)
        mirror(matrix)
        return cls(matrix, True, DAMPING * mean)

    def to(self, device: torch.device) -> "Metric":
        """The same on a device."""
        return self if self.factors is None else replace(self, factors=self.factors.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return 0 if self.factors is None else self.factors.nbytes

    @property
    def plain(self) -> bool:
        """Whether S is the identity."""
        return self.factors is None

    @property
    def mean(self) -> float:
        """Mean of its diagonal."""
        if self.factors is None:
            return self.shift
        if self.is_matrix:
            return self.shift + float(self.factors.diagonal().mean(dtype=torch.float64))
        energy = float(energies(self.factors).sum())
        return self.shift + energy / self.factors.shape[1]

    def diagonal(self, like: Tensor) -> Tensor:
        """Its diagonal, fp32 `[out]`, where a tensor `[out, ...]` is."""
        if self.factors is None:
            return torch.full((len(like),), self.shift, device=like.device)
        own = self.factors.diagonal() if self.is_matrix else self.factors.square().sum(0)
        return own + self.shift

    def __call__(self, x: Tensor) -> Tensor:
        """`S x` for x `[out, n]` or `[out]`, in the dtype of x."""
        if self.factors is None:
            return x
        factors = self.factors.to(x)
        weighted = factors @ x if self.is_matrix else factors.T @ (factors @ x)
        return weighted.add_(x, alpha=self.shift)

    def square(self, rows: Tensor, weight: Tensor) -> Tensor:
        """`sum over tokens of weight * y^T S y`, fp64, for y fp32 `[tokens, out]`."""
        result = self.shift * (weight.double() @ energies(rows))
        if self.factors is None:
            return result
        factors = self.factors
        if self.is_matrix:
            return result + weight.double() @ (rows @ factors * rows).sum(1).double()
        return result + weight.double() @ energies(rows @ factors.T)


def energies(rows: Tensor) -> Tensor:
    """`|y|^2` of each row y of fp32 `[tokens, n]`, fp64 `[tokens]`.

    On a CPU, sums over features are fp64 only where gradients explode, and fp32 would overflow: in
    fp64 they take nine times as long.
    """
    if rows.device.type == "cpu":
        lengths: Tensor = torch.linalg.vector_norm(rows, dim=1)
        if lengths.isfinite().all():
            return lengths.double().square()
    lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return lengths.square()


PLAIN = Metric()
"""`S = I`."""
