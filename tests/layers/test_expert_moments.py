"""The moments of one expert are in memory at a time."""

import weakref
from typing import Any

import pytest

from mergekit_dam.fitting.moments import InputMoments
from mergekit_dam.layers import experts as experts_module
from tests.kit.mixtures import CONFIGS
from tests.kit.models import fine_tunes
from tests.kit.tensors import tokens_of
from tests.kit.walks import merge_here


def live_moments(experts: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Gram matrices that are made while a mixture is fitted, and the most alive at a time."""
    alive, made, most = 0, 0, 0
    stock = InputMoments.zeros

    def release() -> None:
        nonlocal alive
        alive -= 1

    def zeros(*args: Any) -> InputMoments:
        nonlocal alive, made, most
        moments = stock(*args)
        alive, made = alive + 1, made + 1
        most = max(most, alive)
        weakref.finalize(moments.gram, release)
        return moments

    config = CONFIGS["mixtral"](num_local_experts=experts, num_hidden_layers=1)
    models = fine_tunes(config, 2)
    data = {k: tokens_of(k, 64) for k in range(2)}
    with monkeypatch.context() as patch:
        patch.setattr(experts_module, "FEWEST", 1)
        patch.setattr(InputMoments, "zeros", zeros)
        merge_here(config, models, data=data, head=False)
    return made, most


def test_the_moments_of_one_expert_are_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    few, most_of_few = live_moments(4, monkeypatch)
    many, most_of_many = live_moments(32, monkeypatch)
    assert many > few + 32
    assert most_of_many == most_of_few <= 4
