"""Whether the disk has room for a merge."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mergekit_dam.errors import DamError
from mergekit_dam.host.room import check_room, written_bytes


def test_counts_every_tensor_in_the_dtype_in_which_it_is_written() -> None:
    specs: Any = [
        SimpleNamespace(name="a", written=torch.float32),
        SimpleNamespace(name="b", written=None),
        SimpleNamespace(name="shape unknown", written=None),
    ]
    shapes = {"a": (3, 5), "b": (7,)}
    assert written_bytes(specs, shapes, torch.bfloat16) == 3 * 5 * 4 + 7 * 2


def test_refuses_what_does_not_fit_beside_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000_000))
    check_room(tmp_path, model=7_000_000_000, temporary=3_000_000_000)
    with pytest.raises(DamError, match=r"8 GB for the model and 3 GB .*, and 10 GB are free"):
        check_room(tmp_path, model=8_000_000_000, temporary=3_000_000_000)
    with pytest.raises(DamError, match=r"and 4 GB to be continued .*`resume: false`"):
        check_room(tmp_path, model=7_000_000_000, temporary=0, kept=4_000_000_000)
