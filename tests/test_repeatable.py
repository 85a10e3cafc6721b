"""The order in which sums are added up: the same in every run."""

import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_dam import repeatable as module
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.repeatable import in_one_order, repeatable
from tests.kit.merging import dam, merge
from tests.kit.models import Models
from tests.kit.texts import Calibration

OFF, WARNS, STRICT = "off", "warns", "strict"


def mode() -> str:
    """Torch's mode at the moment."""
    if not torch.are_deterministic_algorithms_enabled():
        return OFF
    return WARNS if torch.is_deterministic_algorithms_warn_only_enabled() else STRICT


def unordered() -> Tensor:
    """What torch can do in no certain order alone."""
    return torch.zeros(2).put_(torch.tensor([0]), torch.tensor([3.0]))


def test_a_merge_is_in_the_mode_that_warns_and_gradients_of_blocks_in_the_strict_one(
    llama_models: Models,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    stock = Decoder.run_block

    def run_block(*arguments: Any) -> Tensor:
        seen[torch.is_grad_enabled()].add(mode())
        return stock(*arguments)

    monkeypatch.setattr(Decoder, "run_block", run_block)
    fit: dict[str, Any] = {
        "samples": 4,
        "sequence_length": 16,
        "objective": "layer+logits",
        "steps": 1,
    }
    configuration = dam(llama_models.models, calibration, **fit)
    merge(configuration, tmp_path / "out")
    assert seen == {True: {STRICT}, False: {WARNS}}
    assert mode() == OFF


def test_the_mode_ends_with_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with repeatable():
        assert mode() == WARNS
        assert in_one_order(mode) == STRICT
        assert mode() == WARNS
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
        assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert mode() == OFF
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


def test_it_lasts_while_another_thread_needs_it() -> None:
    entered, done = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        done.wait(10)

    def other() -> None:
        with repeatable():
            in_one_order(hold)

    thread = threading.Thread(target=other)
    with repeatable():
        thread.start()
        assert entered.wait(10)
        assert in_one_order(mode) == STRICT
        assert mode() == STRICT  # the other thread's
    assert mode() == STRICT
    done.set()
    thread.join()
    assert mode() == OFF
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


def test_a_mode_of_the_user_is_there_again_afterwards() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with repeatable():
            assert mode() == WARNS
        assert mode() == STRICT
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_knows_no_order_runs_nevertheless_and_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module._warn.cache_clear()
    with repeatable(), pytest.warns(UserWarning, match="put_"), caplog.at_level(logging.WARNING):
        found = [in_one_order(unordered) for _ in range(2)]
    assert [own.tolist() for own in found] == [[3.0, 0.0]] * 2
    (record,) = caplog.records
    assert "two runs of this merge may differ" in record.getMessage()


def test_other_errors_are_raised() -> None:
    def broken() -> None:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        in_one_order(broken)
    assert mode() == OFF
