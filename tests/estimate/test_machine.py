"""The speed of the machine, measured."""

from pathlib import Path

import torch

from mergekit_dam.estimate.machine import calibrate


def test_the_machine_is_measured(tmp_path: Path) -> None:
    clock = iter(range(10**6))
    made = calibrate(16, 24, tmp_path / "out", torch.device("cpu"), clock=lambda: 0.2 * next(clock))
    assert list(tmp_path.iterdir()) == []
    for name in ("forward", "fp32", "fp64", "cholesky", "elements", "read", "write"):
        assert 0 < getattr(made, name) < float("inf")
    assert made.available <= made.memory
