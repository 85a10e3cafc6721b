"""The number of threads of a merge."""

from pathlib import Path
from typing import Any

import joblib
import pytest
import torch

from mergekit_dam.layers import fit, sweep
from mergekit_dam.threads import use_own_share
from tests.kit.merging import dam, merge
from tests.kit.models import Models
from tests.kit.texts import Calibration


@pytest.mark.parametrize(
    ("of_torch", "quota", "asked", "width", "used"),
    [
        (64, 2, "", 4096, 2),
        (2, 64, "", 4096, 2),
        (64, 2, "8", 4096, None),
        (4, 0, "", 4096, 1),
        (64, 2, "", 192, 1),
        (64, 2, "2", 192, None),
    ],
    ids=[
        "a quota",
        "fewer in torch",
        "a number of the user's",
        "a quota below one",
        "narrow models",
        "a number of the user's for narrow models",
    ],
)
def test_threads_are_as_many_as_processors_may_be_used(
    monkeypatch: pytest.MonkeyPatch,
    of_torch: int,
    quota: int,
    asked: str,
    width: int,
    used: int | None,
) -> None:
    found: list[int] = []
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(joblib, "cpu_count", lambda: quota)
    monkeypatch.setattr(torch, "get_num_threads", lambda: of_torch)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    use_own_share(width)
    assert found == ([] if used is None else [used])


def test_a_merge_of_narrow_models_has_one_thread_and_leaves_the_number_as_it_was(
    llama_models: Models,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    before, seen, stock = torch.get_num_threads(), set(), fit.fit_stage
    torch.set_num_threads(2)

    def fit_stage(*arguments: Any, **more: Any) -> Any:
        seen.add(torch.get_num_threads())
        return stock(*arguments, **more)

    monkeypatch.setattr(sweep, "fit_stage", fit_stage)
    try:
        merge(dam(llama_models.models, calibration), tmp_path / "out")
        assert seen == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
