"""Parts of tiny models, with their weights."""

from collections.abc import Callable

from torch import Tensor

from mergekit_dam.model.decoder import Decoder
from mergekit_dam.model.part import Part
from tests.kit.models import ARCHITECTURES, make_model
from tests.kit.tensors import CPU


def part_and_weights(name: str, make: Callable[[Decoder], Part]) -> tuple[Part, dict[str, Tensor]]:
    """A part of a tiny model with its weights, by relative names; tied ones left out."""
    model = make_model(ARCHITECTURES[name]())
    decoder = Decoder(model.config, CPU)
    part = make(decoder)
    outside = part.prefix == ""
    weights = {
        full.removeprefix(part.prefix): parameter.detach().clone()
        for full, parameter in model.named_parameters()
        if (decoder.block_of(full) is None if outside else full.startswith(part.prefix))
    }
    if outside:
        places = decoder.input_or_output(frozenset(weights))
        weights = {n: w for n, w in weights.items() if places[n] == part.label}
    return part, weights
