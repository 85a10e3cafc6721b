"""The number of threads of a merge."""

import joblib
import pytest
import torch

from mergekit_dam.threads import use_own_share


@pytest.mark.parametrize(
    ("of_torch", "quota", "asked", "used"),
    [(64, 2, "", 2), (2, 64, "", 2), (64, 2, "8", None), (4, 0, "", 1)],
    ids=["a quota", "fewer in torch", "a number of the user's", "a quota below one"],
)
def test_threads_are_as_many_as_processors_may_be_used(
    monkeypatch: pytest.MonkeyPatch, of_torch: int, quota: int, asked: str, used: int | None
) -> None:
    found: list[int] = []
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(joblib, "cpu_count", lambda: quota)
    monkeypatch.setattr(torch, "get_num_threads", lambda: of_torch)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    use_own_share()
    assert found == ([] if used is None else [used])
