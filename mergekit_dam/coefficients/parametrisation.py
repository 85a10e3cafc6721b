"""The affine form of coefficients: which coefficients are possible, and where a fit starts."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parametrisation:
    """Affine map from the U unknowns of a column to the coefficients of the S sources.

    `c = offset + expand @ d`, so that `W = W_origin + sum_u d_u * T_u` with
    `W_origin = sum_s offset_s W_s` and directions `T_u = sum_s expand[s, u] W_s`.

    Attributes:
        offset: fp64 `[S]`, coefficients at unknowns of zero.
        expand: fp64 `[S, U]`, coefficients per unknown.
        start: fp64 `[U]`, unknowns of the weighted average.
        merged: Indices of the models to merge: all sources, except a base that is not merged and
            sources that a slice leaves out.
        base: Index of the base among the sources, or None if no base takes part.
    """

    offset: Tensor
    expand: Tensor
    start: Tensor
    merged: tuple[int, ...]
    base: int | None

    @classmethod
    def create(
        cls,
        weights: Sequence[float],
        *,
        base: int | None,
        include_base: bool,
        sum_to_one: bool,
        left_out: Collection[int] = (),
    ) -> "Parametrisation":
        """The form that a configuration requests.

        Args:
            weights: Relative starting weight of each source; the base's weight counts only
                with `include_base`.
            base: Index of the base among the sources.
            include_base: Whether the base is a model to merge too.
            sum_to_one: True: with a base, the task-vector form, in which the base takes the
                remainder; without one, the affine form around the average. False: the free form.
            left_out: Sources whose coefficients are 0, whatever the unknowns are.
        """
        count = len(weights)
        present = [s for s in range(count) if s not in left_out]
        # A single source is taken as it is: its only direction is zero.
        alone = len(present) == 1
        base = base if base in present and not alone else None
        merged = [s for s in present if s != base or include_base]
        share = torch.zeros(count, dtype=torch.float64)
        share[merged] = torch.tensor(
            [1.0 if alone else weights[s] for s in merged], dtype=torch.float64
        )
        share /= share.sum()
        identity = torch.eye(count, dtype=torch.float64)
        if not sum_to_one and not alone:
            offset = torch.zeros(count, dtype=torch.float64)
            return cls(offset, identity[:, merged], share[merged], tuple(merged), base)
        if base is not None:
            free = [s for s in present if s != base]
            expand = identity[:, free]
            expand[base] = -1
            return cls(identity[base].clone(), expand, share[free], tuple(merged), base)
        # Affine form: the origin is the average itself, so the start is the zero vector.
        start = torch.zeros(len(merged), dtype=torch.float64)
        return cls(share, (identity - share[:, None])[:, merged], start, tuple(merged), None)

    @property
    def sums_to_one(self) -> bool:
        """Whether coefficients of a column sum to one over the sources, for all unknowns."""
        return float(self.expand.sum(0).abs().max()) <= 1e-9  # the shares are rounded

    @property
    def reached(self) -> tuple[int, ...]:
        """Indices of the sources whose coefficients are not always 0."""
        taken = (self.expand != 0).any(1) | (self.offset != 0)
        return tuple(taken.nonzero().flatten().tolist())

    def coefficients(self, unknowns: Tensor) -> Tensor:
        """Coefficients fp32 `[S, n]` of unknowns `[U, n]`, computed in fp64 and then cast.

        The result is differentiable in the unknowns.
        """
        expand = self.expand.to(unknowns.device)
        offset = self.offset.to(unknowns.device)
        return (offset[:, None] + expand @ unknowns.double()).float()

    def stepped(self, step: Tensor) -> Tensor:
        """Coefficients fp32 `[S, n]` after a step `[U, n]` of the unknowns from the start."""
        return self.coefficients(self.start.to(step)[:, None] + step)

    def unknowns(self, coefficients: Tensor) -> Tensor:
        """Unknowns fp64 `[U, n]` whose coefficients are nearest to the given ones, `[S, n]`."""
        expand = self.expand.to(coefficients.device)
        offset = self.offset.to(coefficients.device)
        inverse: Tensor = torch.linalg.pinv(expand)
        return inverse @ (coefficients.double() - offset[:, None])

    def starting_coefficients(self, columns: int = 1) -> Tensor:
        """Coefficients fp32 `[S, columns]` of the weighted average."""
        return self.coefficients(self.start[:, None].expand(-1, columns))

    def random_coefficients(self, generator: torch.Generator) -> Tensor:
        """Coefficients fp32 `[S, 1]` of a random average of the models."""
        share = torch.rand(len(self.merged), generator=generator, dtype=torch.float64).softmax(0)
        rows = torch.zeros(len(self.offset), dtype=torch.float64)
        rows[list(self.merged)] = share
        return rows[:, None].float()

    def average(self, tensors: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
        """The tensor at the start of a fit: `W_origin + sum_u start_u * T_u`."""
        return _combine(tensors, self.offset + self.expand @ self.start, dtype)

    def directions(self, tensors: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
        """The directions `T_u` of the sources' tensors: `[U, *shape]`."""
        count, like = self.expand.shape[1], tensors[0]
        found = torch.empty(count, *like.shape, dtype=dtype, device=like.device)
        for direction, column in zip(found, self.expand.T, strict=True):
            direction.copy_(_combine(tensors, column, dtype))
        return found


def _combine(tensors: Sequence[Tensor], factors: Tensor, dtype: torch.dtype) -> Tensor:
    total = torch.zeros_like(tensors[0], dtype=dtype)
    for tensor, factor in zip(tensors, factors.tolist(), strict=True):
        if factor:
            total.add_(tensor.to(dtype), alpha=factor)
    return total
