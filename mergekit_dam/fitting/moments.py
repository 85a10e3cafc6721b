"""Sufficient statistics of a least-squares fit, accumulated chunk by chunk.

A fit uses its calibration tokens only through these sums, however many they are. Products of a
chunk are fp32, sums over chunks are fp64 (fp32 for matrices too large to be factorised). The
held-out data that judges the fit is small, and is kept token by token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mergekit_dam.fitting.metric import PLAIN, Metric
from mergekit_dam.fitting.problem import Term
from mergekit_dam.fitting.symmetric import add_products, mirror
from mergekit_dam.fitting.tensor_cores import exact
from mergekit_dam.streams.distributed import all_sum, all_totals, shared_rows


def kept_bytes(columns: int, outs: Sequence[int], models: int, dtype: torch.dtype) -> int:
    """Bytes of the matrices of linears with one input, where every model has its own.

    Args:
        columns: Input features.
        outs: Output features of each linear.
        models: Models with calibration data.
        dtype: Dtype of the sums.
    """
    return dtype.itemsize * models * columns * (columns + sum(outs))


def nothing() -> Tensor:
    """An empty sum, fp64. It goes where what is added to it is: reading it there would wait."""
    return torch.zeros((), dtype=torch.float64)


@dataclass
class InputMoments:
    """Sums over weighted tokens of a linear's input `x [in]`; linears with one input share them.

    Attributes:
        gram: `sum x x^T`, `[in, in]`; before `add_up`, on and below its diagonal alone. It is on
            the device, or on the host after `keep_on_host`.
        x_sum: `sum x`, `[in]`.
        count: Sum of the tokens' weights.
    """

    gram: Tensor
    x_sum: Tensor
    count: Tensor = field(default_factory=nothing)

    @classmethod
    def zeros(
        cls, in_features: int, device: torch.device, dtype: torch.dtype = torch.float64
    ) -> "InputMoments":
        """Empty sums."""
        gram = torch.zeros(in_features, in_features, dtype=dtype, device=device)
        return cls(gram, torch.zeros(in_features, dtype=torch.float64, device=device))

    def add(self, x: Tensor, weight: Tensor) -> None:
        """Add a chunk: fp32 `[tokens, in]`, and the tokens' weights `[tokens]`."""
        # One fp32 product per chunk; the sum over chunks has the dtype of `gram`. Both factors, and
        # those of `cross`, are rounded alike where products round them.
        scaled = x * weight.sqrt()[:, None]
        add_products(self.gram, scaled)
        self.x_sum += weight @ x
        self.count = self.count + weight.sum(dtype=torch.float64)

    def add_up(self) -> None:
        """Add the sums of the other processes, and complete the Gram matrix."""
        self.gram, self.x_sum = all_sum(self.gram), all_sum(self.x_sum)
        mirror(self.gram)
        (self.count,) = all_totals(self.count)

    def keep_on_host(self) -> None:
        """Move the Gram matrix to the host; it is copied to the device whenever it is used."""
        self.gram = self.gram.cpu()

    @property
    def gram_on_device(self) -> Tensor:
        """The Gram matrix on the device."""
        return self.gram.to(self.x_sum.device)

    @property
    def diagonal(self) -> Tensor:
        """The diagonal of the Gram matrix, on the device."""
        return self.gram.diagonal().contiguous().to(self.x_sum.device)

    def scaled(self, factor: float) -> "InputMoments":
        """A copy with its tokens weighted by `factor`, on the device."""
        return InputMoments(self.gram_on_device * factor, self.x_sum * factor, self.count * factor)

    def add_scaled(self, other: "InputMoments", factor: float) -> None:
        """Add another set of sums with its tokens weighted by `factor`."""
        self.gram.add_(other.gram_on_device, alpha=factor)
        self.x_sum.add_(other.x_sum, alpha=factor)
        self.count = self.count + factor * other.count


@dataclass
class LinearMoments:
    """Sums over weighted tokens of one linear's inputs `x [in]` and targets `y [out]`.

    Attributes:
        inputs: Sums of the inputs alone. Linears with one input share them; the caller adds each
            chunk once.
        cross: `sum y x^T`, `[out, in]`, where the Gram matrix is.
        y_sum: `sum y`, `[out]`.
        y_square: `sum |y|^2`.
        energy: `sum |teacher's own output|^2`; the target may differ from that output.
        metric: Metric of the errors, of `y_square` and of `energy`.
        scale: Factor of all these sums.
        squares: Whether `y_square` and `energy` are summed, without which no loss is known.
    """

    inputs: InputMoments
    cross: Tensor
    y_sum: Tensor
    y_square: Tensor = field(default_factory=nothing)
    energy: Tensor = field(default_factory=nothing)
    metric: Metric = PLAIN
    scale: float = 1.0
    squares: bool = True

    @classmethod
    def zeros(
        cls,
        out_features: int,
        inputs: InputMoments,
        metric: Metric = PLAIN,
        *,
        squares: bool = True,
    ) -> "LinearMoments":
        """Empty sums, with the given sums of the inputs."""
        cross = inputs.gram.new_zeros(out_features, inputs.gram.shape[1])
        y_sum = inputs.x_sum.new_zeros(out_features)
        return cls(inputs, cross, y_sum, metric=metric, squares=squares)

    @property
    def count(self) -> Tensor:
        """Sum of the tokens' weights."""
        return self.inputs.count

    def add(self, x: Tensor, target: Tensor, output: Tensor, weight: Tensor) -> None:
        """Add a chunk to all sums except `inputs`.

        Args:
            x: Inputs fp32 `[tokens, in]`.
            target: Targets `[tokens, out]`.
            output: The teacher's own output `[tokens, out]`.
            weight: Weight of each token, `[tokens]`.
        """
        root = weight.sqrt()[:, None]
        self.cross += (target * root).T @ (x * root)
        self.y_sum += weight @ target
        if not self.squares:
            return
        energy = self.metric.square(output, weight)
        square = energy if target is output else self.metric.square(target, weight)
        self.energy, self.y_square = self.energy + energy, self.y_square + square

    def add_up(self) -> None:
        """Add the sums of the other processes, except to `inputs`."""
        self.cross, self.y_sum = all_sum(self.cross), all_sum(self.y_sum)
        self.y_square, self.energy = all_totals(self.y_square, self.energy)

    def keep_on_host(self) -> None:
        """Move the matrices to the host; they are copied to the device whenever they are used."""
        self.inputs.keep_on_host()
        self.cross = self.cross.cpu()

    @property
    def cross_on_device(self) -> Tensor:
        """`cross` on the device."""
        return self.cross.to(self.y_sum.device)

    def scaled(self, factor: float) -> "LinearMoments":
        """A copy with its tokens weighted by `factor`, on the device, with its own `inputs`."""
        return LinearMoments(
            self.inputs.scaled(factor),
            self.cross_on_device * factor,
            self.y_sum * factor,
            self.y_square * factor,
            self.energy * factor,
            self.metric,
        )

    def add_scaled(self, other: "LinearMoments", factor: float) -> None:
        """Add another set of sums with its tokens weighted by `factor`."""
        self.inputs.add_scaled(other.inputs, factor)
        self.cross.add_(other.cross_on_device, alpha=factor)
        self.y_sum.add_(other.y_sum, alpha=factor)
        self.y_square = self.y_square + factor * other.y_square
        self.energy = self.energy + factor * other.energy

    def residual(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`sum (y - W x - b) x^T`, `[out, in]`, unscaled; processes share its rows."""
        gram = self.inputs.gram_on_device

        def made(rows: slice) -> Tensor:
            cross = self.cross[rows].to(gram.device)
            with exact():
                left = cross - weight[rows].to(gram) @ gram
            if bias is not None:
                left -= torch.outer(bias[rows].to(left), self.inputs.x_sum.to(left))
            return left

        return shared_rows(len(weight), made)

    def term(self, weight: Tensor, bias: Tensor | None) -> Term:
        """The term of a quadratic in the steps away from a weight `[out, in]`."""
        residual = self.residual(weight, bias)
        return Term(self.inputs.gram_on_device, residual, self.metric, self.scale)

    def error(self, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> float:
        """`scale * sum |W x + b - y|^2` in the metric, for a weight `[out, in]`, bias `[out]`.

        Args:
            residual: `self.residual(weight, bias)`, where it is known.
        """
        if residual is None:
            residual = self.residual(weight, bias)
        cross = self.cross_on_device
        weight = weight.to(cross)
        with exact():
            weighted = self.metric(weight)
        squared = self.y_square - (weighted * (cross + residual)).sum(dtype=torch.float64)
        if bias is not None:
            bias = bias.double()
            left = self.y_sum - weight.double() @ self.inputs.x_sum - self.count * bias
            squared -= (self.metric(bias) * (self.y_sum + left)).sum()
        # Rounding can make a small difference of large sums negative.
        return self.scale * max(float(squared), 0.0)


def measured_plainly(moments: Sequence[LinearMoments]) -> bool:
    """Whether the errors of all domains are measured in the plain metric."""
    return all(own.metric.plain for own in moments)


def plain_weights(moments: Sequence[LinearMoments]) -> list[float]:
    """Weights of the domains in one plain metric: each by its own and the mean of its metric."""
    return [own.scale * own.metric.mean for own in moments]


def pooled(moments: Sequence[LinearMoments], weights: Sequence[float]) -> LinearMoments:
    """The sums of all domains in the plain metric, weighted as `plain_weights` says.

    Squares of outputs are left out: those of different metrics have no sum. A single domain that
    weighs 1 is not copied.
    """
    if len(moments) == 1 and moments[0].metric.plain and moments[0].scale == 1:
        return moments[0]
    total = moments[0].scaled(weights[0])
    for own, weight in zip(moments[1:], weights[1:], strict=True):
        total.add_scaled(own, weight)
    return replace(total, metric=PLAIN, squares=False)


@dataclass
class LinearTokens:
    """Held-out inputs and targets of one linear, token by token; they judge its fit.

    They stay on the device, and in the process, that ran them. They are few: a Gram matrix would
    take more memory.

    Attributes:
        energy, count, metric, scale: The same as in `LinearMoments`.
    """

    metric: Metric = PLAIN
    energy: Tensor = field(default_factory=nothing)
    count: Tensor = field(default_factory=nothing)
    scale: float = 1.0
    _chunks: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, x: Tensor, target: Tensor, output: Tensor, weight: Tensor) -> None:
        """Add a chunk, as to `LinearMoments`."""
        self.energy = self.energy + self.metric.square(output, weight)
        self.count = self.count + weight.sum(dtype=torch.float64)
        self._chunks.append((x, target, weight))

    def add_up(self) -> None:
        """Add the sums of the other processes."""
        self.energy, self.count = all_totals(self.energy, self.count)

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """`scale * sum |W x + b - y|^2` in the metric, over all processes."""
        weight, own = weight.float(), nothing()
        for x, target, counted in self._chunks:
            left = x @ weight.T - target
            if bias is not None:
                left += bias.float()
            own = own + self.metric.square(left, counted)
        return self.scale * float(*all_totals(own))
