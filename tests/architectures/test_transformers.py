"""Every causal language model of transformers, run in parts."""

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
)

from mergekit_dam.errors import ArchitectureError
from mergekit_dam.model.probe import make_decoder
from tests.architectures.sizes import tiny
from tests.kit.models import make_model, weights_of
from tests.kit.parts import streamed


@pytest.mark.slow
def test_every_causal_model_of_transformers_runs_in_parts_exactly_or_is_refused() -> None:
    """Of those that are tiny with the sizes at hand; nothing runs otherwise without a word."""
    exact: list[str] = []
    refused: list[str] = []
    wrong: list[str] = []
    tokens = torch.arange(24).reshape(2, 12) + 4
    for kind, config_class in CONFIG_MAPPING.items():
        if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
            continue
        try:
            config = tiny(config_class)()
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size > 3_000_000:
                continue
            model = make_model(config)
            with torch.no_grad():  # attention takes another kernel where gradients are asked for
                whole = model(tokens, use_cache=False).logits
        except Exception:  # it needs sizes of its own, or a package
            continue
        try:
            decoder = make_decoder(model.config, torch.device("cpu"))
        except ArchitectureError:
            refused.append(kind)
            continue
        equal = torch.equal(streamed(decoder, weights_of(model), tokens), whole)
        (exact if equal else wrong).append(kind)
    assert not wrong
    assert len(exact) > 100
    assert len(refused) > 5
