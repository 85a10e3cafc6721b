"""Units of unusual modules, and the parts of a norm."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergekit_dam.model.anatomy import examine, norm_parts
from mergekit_dam.model.part import block_part
from mergekit_dam.model.units import Anatomy
from tests.kit.parts import part_and_weights


class Scaled(nn.Module):
    """A part with units that are almost linear, norm or embedding, and one that is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.clipped = Clipped(4, 4)
        self.shared = nn.Linear(4, 4)
        self.gated = Gated()
        self.once = nn.Linear(4, 4)
        self.minus = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.clipped(x) + self.shared(self.shared(x)) + self.gated(x)
        out: Tensor = 2 * x + self.once(torch.tanh(y)) - 0.5 * self.minus(torch.tanh(y))
        return out


class Clipped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-0.5, 0.5)


class Gated(nn.Module):
    """A norm with a third parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.gate = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.weight * x / x.norm(dim=-1, keepdim=True) + self.gate
        return out


def examined(module: nn.Module) -> Anatomy:
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    x = torch.randn(1, 6, 4)
    return examine(module, lambda: functional_call(module, weights, (x,)), weights, x)


def test_units_that_are_not_of_a_known_form_are_other() -> None:
    """Clipped outputs, a module called twice, a third parameter: averaged, never fitted."""
    torch.manual_seed(0)
    anatomy = examined(Scaled())
    kinds = {unit.name: unit.kind for unit in anatomy.units}
    assert kinds == {
        "clipped": "other",
        "shared": "other",
        "gated": "other",
        "once": "linear",
        "minus": "linear",
    }


def test_scales_of_residual_and_writers_are_measured() -> None:
    torch.manual_seed(0)
    anatomy = examined(Scaled())
    scales = {unit.name: unit.write.scale for unit in anatomy.units if unit.write}
    assert scales == {"once": pytest.approx(1.0), "minus": pytest.approx(-0.5)}
    assert anatomy.residual_scale == pytest.approx(2.0)


def test_a_stream_that_passes_through_a_nonlinearity_has_no_residual() -> None:
    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.tanh(x + self.up(x))
            return out

    anatomy = examined(Through())
    assert anatomy.residual_scale == 0
    assert [unit.write for unit in anatomy.units] == [None]


@pytest.mark.parametrize("bias", [False, True])
def test_norm_parts_rebuild_the_norms_output(bias: bool) -> None:
    norm = nn.LayerNorm(8, bias=bias)
    own = {name: torch.randn(8) for name, _ in norm.named_parameters()}
    x = torch.randn(3, 8)
    at_zero, normalised = norm_parts(norm, x, own)
    rebuilt = at_zero + own["weight"] * normalised + own.get("bias", torch.zeros(8))
    torch.testing.assert_close(rebuilt, functional_call(norm, own, (x,)))
    assert not at_zero.any()


def test_norm_parts_of_gemma_show_the_unit_gain() -> None:
    part, weights = part_and_weights("gemma2", lambda decoder: block_part(decoder, 0))
    x = torch.randn(3, 16)
    own = {"weight": weights["input_layernorm.weight"]}
    at_zero, normalised = norm_parts(part.root.get_submodule("input_layernorm"), x, own)
    torch.testing.assert_close(at_zero, normalised)
