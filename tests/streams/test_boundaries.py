"""Boundary states come back as they were put in."""

from pathlib import Path

import torch

from mergekit_dam.streams.boundaries import BoundaryStates


def test_boundary_states_come_back_as_they_were_put_in(tmp_path: Path) -> None:
    boundaries = BoundaryStates(tmp_path / "a" / "b")
    tensors = [torch.randn(2, 3, 4).transpose(0, 1), torch.randn(5, 3), *torch.randn(10, 2)]
    boundaries.put(3, tensors)
    boundaries.put(12, [torch.zeros(1)])
    assert all(a.equal(b) for a, b in zip(boundaries.get(3), tensors, strict=True))
    boundaries.put(3, tensors[:1])
    (again,) = boundaries.get(3)
    assert again.equal(tensors[0])
