"""Made-up linears with data, and their explicit least squares."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dam.fitting.problem import ColumnProblem, Term


@dataclass(frozen=True)
class Layer:
    """A made-up linear: directions fp64 `[U, out, in]`, and data of each domain.

    Attributes:
        domains: (weight, inputs `[tokens, in]`, targets less the start's output
            `[tokens, out]`) of every domain.
    """

    directions: Tensor
    domains: list[tuple[float, Tensor, Tensor]]

    @property
    def problem(self) -> ColumnProblem:
        terms = [Term(w * x.T @ x, w * y.T @ x) for w, x, y in self.domains]
        return ColumnProblem(self.directions, terms)

    def design(self) -> tuple[Tensor, Tensor]:
        """Explicit least squares: the output as a matrix times the unknowns, and the target.

        Column (u, p) of the matrix is what `d[u, p] = 1` adds to all outputs: the outer
        product of input column p with column p of direction u.
        """
        rows, targets = [], []
        for weight, x, y in self.domains:
            columns = torch.einsum("np,uop->noup", x, self.directions)
            rows.append(weight**0.5 * columns.flatten(2).flatten(0, 1))
            targets.append(weight**0.5 * y.flatten())
        return torch.cat(rows), torch.cat(targets)

    def dense(self, ridge: float, *, tied: bool = False) -> Tensor:
        """The minimiser by torch's own least squares, the ridge as extra rows.

        Args:
            tied: all columns of a direction share one unknown.
        """
        design, target = self.design()
        count, _, columns = self.directions.shape
        if tied:
            design = design.unflatten(1, (count, columns)).sum(2)
        shift = ridge * design.square().sum(0).mean()
        rows = shift.sqrt() * torch.eye(design.shape[1], dtype=torch.float64)
        design, target = torch.cat([design, rows]), torch.cat([target, target.new_zeros(len(rows))])
        solution: Tensor = torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution
        return solution.reshape(count, -1)

    def loss(self, unknowns: Tensor, shift: Tensor) -> Tensor:
        """The regularised objective, straight from data."""
        weight = (self.directions * unknowns[:, None, :]).sum(0)
        loss: Tensor = shift * unknowns.square().sum()
        for domain_weight, x, y in self.domains:
            loss = loss + domain_weight * (x @ weight.T - y).square().sum()
        return loss

    def shift(self, ridge: float) -> Tensor:
        """The absolute ridge."""
        return ridge * self.design()[0].square().sum(0).mean()


def make_layer(
    *,
    models: int = 3,
    out: int = 5,
    columns: int = 7,
    domains: int = 2,
    tokens: int = 9,
    seed: int = 0,
) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Layer(
        directions=randn(models, out, columns),
        domains=[(0.5 + k, randn(tokens, columns), randn(tokens, out)) for k in range(domains)],
    )
