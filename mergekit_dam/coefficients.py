"""Coefficients: what they multiply, where they start, how they are saved.

A merged weight is `W = sum_s c_s * W_s` over the sources s (the models, and the base where
there is one), with one coefficient per input column of each (arXiv 2410.08371).
"""

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergekit_dam.errors import ConfigError

LOG = logging.getLogger(__name__)

FILE_NAME = "dam_coefficients.safetensors"
_METADATA_KEY = "mergekit_dam"

_PIECE = 2**22
"""Elements of a weight that are worked on at a time."""


def merge_weights(tensors: Sequence[Tensor], coefficients: Tensor, *, axis: int = -1) -> Tensor:
    """Merge one tensor of every source; the fit and the writer both call this.

    Args:
        tensors: one tensor a source, all of one shape and device; borrowed.
        coefficients: fp32 `[sources, n]` with n the tensors' size along `axis`, or
            `[sources, 1]` for one coefficient a source. Of experts `[experts, ., .]` it may be
            `[sources, experts * n]`: those of each expert, one after the other.
        axis: the input dimension of the weight.

    Returns:
        fp32 tensor of the sources' shape. A source whose coefficients are all zero is left
        out, so that one-hot coefficients give back the source bit for bit.
    """
    like = tensors[0]
    shape = _facing(coefficients.shape[1], like.shape, axis)
    scales = [
        coefficient.to(device=like.device, dtype=torch.float32).reshape(shape).expand(like.shape)
        for coefficient in coefficients
    ]
    taking_part = [
        (tensor, scale)
        for tensor, scale, coefficient in zip(tensors, scales, coefficients, strict=True)
        if coefficient.any()
    ]
    merged = torch.zeros_like(like, dtype=torch.float32)
    for rows in _pieces(like):
        for index, (tensor, scale) in enumerate(taking_part):
            if index == 0:
                merged[rows] = tensor[rows].float() * scale[rows]
            else:
                merged[rows].addcmul_(tensor[rows].float(), scale[rows])
    return merged


def _pieces(tensor: Tensor) -> Iterator[Any]:
    """Indices of rows worked on at a time, so that copies in fp32 take little memory."""
    if tensor.ndim == 0:
        yield ...
        return
    rows = max(1, _PIECE // max(1, tensor[:1].numel()))
    for first in range(0, len(tensor), rows):
        yield slice(first, first + rows)


def column_counts(shape: Sequence[int], axis: int = -1) -> tuple[int, ...]:
    """How many coefficients a source may have before a tensor: 1, one a column, one an expert's.

    Args:
        shape: of the tensor; of three dimensions, the first are experts.
        axis: the input dimension.
    """
    if not shape:
        return (1,)
    columns = shape[axis]
    return (1, columns, shape[0] * columns) if len(shape) == 3 else (1, columns)


def _facing(count: int, shape: Sequence[int], axis: int) -> list[int]:
    """The shape in which so many coefficients multiply a tensor."""
    facing = [1] * len(shape)
    if shape:
        facing[axis] = -1
    if len(shape) == 3 and count not in (1, shape[axis]):
        facing[0] = shape[0]
    return facing


def coefficient_gradient(
    tensors: Sequence[Tensor], gradient: Tensor, *, axis: int = -1, per_column: bool
) -> Tensor:
    """Turn the gradient of a merged tensor into that of its coefficients.

    `dL/dc_s = sum over rows of W_s * dL/dW`: no autograd graph holds N models.

    Args:
        tensors: one tensor a source, as `merge_weights` takes them.
        gradient: of the merged tensor, of their shape.
        axis: the input dimension of the weight.
        per_column: one coefficient a column (of every expert), else one a tensor.

    Returns:
        fp64 `[sources, n]`, or `[sources, 1]`.
    """
    if per_column and gradient.ndim == 3:
        experts = zip(*tensors, gradient, strict=True)
        return torch.cat(
            [
                coefficient_gradient(own, of_expert, axis=expert_axis(axis), per_column=True)
                for *own, of_expert in experts
            ],
            dim=1,
        )
    size = gradient.shape[axis] if per_column and gradient.ndim else 1
    # With the columns last, rows are added up some at a time: products take no memory.
    turned = gradient.movedim(axis, -1).reshape(-1, size) if size > 1 else gradient.reshape(-1, 1)
    result = torch.zeros(len(tensors), size, dtype=torch.float64, device=gradient.device)
    for row, tensor in zip(result, tensors, strict=True):
        facing = tensor.movedim(axis, -1).reshape(-1, size) if size > 1 else tensor.reshape(-1, 1)
        rows = max(1, _PIECE // size)
        for w, g in zip(torch.split(facing, rows), torch.split(turned, rows), strict=True):
            row += (w.float() * g).sum(0)
    return result


def expert_axis(axis: int) -> int:
    """The dimension of one expert's slice that is `axis` of the fused tensor."""
    return axis - 1 if axis > 0 else axis


def rows_of_expert(coefficients: Tensor, shape: Sequence[int], axis: int, expert: int) -> Tensor:
    """The coefficients of one expert's slice of a fused tensor: `[sources, n]` or `[sources, 1]`.

    Args:
        coefficients: of the fused tensor, as `merge_weights` takes them.
        shape, axis: of the fused tensor.
    """
    columns = shape[axis]
    if coefficients.shape[1] in (1, columns):
        return coefficients
    return coefficients[:, expert * columns : (expert + 1) * columns]


@dataclass(frozen=True)
class Parametrisation:
    """Affine map from the U unknowns of a column to the coefficients of its S sources.

    `c = offset + expand @ d`, so that `W = W_origin + sum_u d_u * T_u` with
    `W_origin = sum_s offset_s W_s` and directions `T_u = sum_s expand[s, u] W_s`.

    Attributes:
        offset: fp64 `[S]`.
        expand: fp64 `[S, U]`.
        start: fp64 `[U]`, the unknowns of the weighted average.
        merged: the sources that are models to merge; all but a base that is none, and those that
            a slice leaves out.
        base: index of the base among the sources that take part, or None.
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
        """The form that a configuration asks for.

        Args:
            weights: relative starting weight of each source; that of the base counts only
                with `include_base`.
            base: index of the base among the sources.
            include_base: the base is a model to merge too.
            sum_to_one: with a base, the task-vector form, the base taking the remainder;
                without one, the affine form around the average. False: the free form.
            left_out: sources whose coefficients are 0, whatever the unknowns.
        """
        count = len(weights)
        present = [s for s in range(count) if s not in left_out]
        # A source that nothing is merged with is taken as it is: there is no step away from it.
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
        """Whether coefficients of a column sum to one over the sources, whatever the unknowns."""
        return float(self.expand.sum(0).abs().max()) <= 1e-9

    @property
    def reached(self) -> tuple[int, ...]:
        """The sources whose coefficients are not 0 whatever the unknowns."""
        taken = (self.expand != 0).any(1) | (self.offset != 0)
        return tuple(taken.nonzero().flatten().tolist())

    def coefficients(self, unknowns: Tensor) -> Tensor:
        """Coefficients fp32 `[S, n]` of unknowns `[U, n]`; computed in fp64, cast last.

        Differentiable in the unknowns.
        """
        expand = self.expand.to(unknowns.device)
        offset = self.offset.to(unknowns.device)
        return (offset[:, None] + expand @ unknowns.double()).float()

    def stepped(self, step: Tensor) -> Tensor:
        """Coefficients fp32 `[S, n]` of unknowns a step `[U, n]` away from the start."""
        return self.coefficients(self.start.to(step)[:, None] + step)

    def unknowns(self, coefficients: Tensor) -> Tensor:
        """Unknowns fp64 `[U, n]` whose coefficients come nearest to `[S, n]`."""
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
        """`W_origin + sum_u start_u * T_u`: where a fit starts."""
        return _combine(tensors, self.offset + self.expand @ self.start, dtype)

    def directions(self, tensors: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
        """`T_u`, `[U, *shape]`, of the sources' tensors."""
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


@dataclass(frozen=True)
class CoefficientFile:
    """A saved set of coefficients.

    Attributes:
        coefficients: output tensor's name -> fp32 `[sources, n]`.
        sources: the models in the order of the rows, as written in the configuration.
        metadata: provenance: versions, revisions, parameters, digests of the calibration.
        parameter: of the configuration, which named the file: problems begin with it.
    """

    coefficients: Mapping[str, Tensor]
    sources: tuple[str, ...]
    metadata: Mapping[str, Any]
    parameter: str = "coefficients"

    def rows_of(self, sources: Sequence[str]) -> list[int]:
        """The rows of the coefficients that belong to some sources, in their order.

        Models are found by name; if their names changed (a CI job elsewhere), by position.

        Raises:
            ConfigError: the file was made from another number of models.
        """
        if set(sources) == set(self.sources):
            return [self.sources.index(source) for source in sources]
        if len(sources) != len(self.sources):
            raise ConfigError(
                [
                    f"{self.parameter}: made from {len(self.sources)} models "
                    f"({', '.join(self.sources)}), got {len(sources)} ({', '.join(sources)})"
                ]
            )
        pairs = ", ".join(f"{a} as {b}" for a, b in zip(sources, self.sources, strict=True))
        LOG.warning("%s: models go by other names now; taking %s", self.parameter, pairs)
        return list(range(len(sources)))

    def save(self, path: Path) -> None:
        """Write atomically: a reader sees the whole file or none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        # Under one key: safetensors writes several in an order that differs from run to run.
        provenance = json.dumps({**self.metadata, "sources": self.sources}, sort_keys=True)
        # Tied tensors share their coefficients, which safetensors refuses to write.
        tensors = {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in self.coefficients.items()
        }
        save_file(tensors, temporary, metadata={_METADATA_KEY: provenance})
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path, *, parameter: str = "coefficients") -> "CoefficientFile":
        """Read a file, or the file of that name in a folder.

        Args:
            parameter: of the configuration, which names the file.

        Raises:
            ConfigError: no such file, or not one that this package wrote.
        """
        path = Path(path)
        file = path / FILE_NAME if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(
                [
                    f"{parameter}: no file at {file}; give the path of a {FILE_NAME} "
                    f"that an earlier dam merge wrote, or of its folder"
                ]
            )
        try:
            with safe_open(file, framework="pt") as handle:
                metadata = json.loads((handle.metadata() or {})[_METADATA_KEY])
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (safe_open is no mapping)
            sources = tuple(metadata.pop("sources"))
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ConfigError(
                [f"{parameter}: {file} was not written by a dam merge ({error!r})"]
            ) from error
        return cls(tensors, sources, metadata, parameter)
