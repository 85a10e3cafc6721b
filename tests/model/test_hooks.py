"""Captured and substituted outputs of modules."""

import pytest
import torch
from torch import nn

from mergekit_dam.model.hooks import capture, substitute


def test_captured_tensors_are_copies_from_a_run_that_stops_early() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    ran = []
    module[2].register_forward_hook(lambda *_: ran.append(True))
    x = torch.randn(2, 4)
    with capture(module, inputs=("0",), outputs=("0",)) as captured:
        module(x)
    assert captured.inputs["0"].equal(x)
    assert captured.outputs["0"].equal(module[0](x))
    assert (captured.outputs["0"] < 0).any()
    assert len(ran) == 0


def test_an_error_inside_a_capture_is_raised_and_hooks_are_removed() -> None:
    module = nn.Linear(4, 4)
    with pytest.raises(RuntimeError), capture(module, outputs=("",)):
        module(torch.randn(2, 5))
    assert not module._forward_hooks


def test_substituted_units_put_out_copies_of_what_is_known() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    known = torch.randn(2, 4)
    before = known.clone()
    with substitute(module, {"0": known}):
        assert module(torch.zeros(2, 4)).equal(known.relu())
    assert known.equal(before)
    assert not module(torch.zeros(2, 4)).equal(known.relu())
