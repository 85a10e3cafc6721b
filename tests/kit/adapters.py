"""LoRA adapters with known weights."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.kit.models import loaded


def save_adapter(
    base: Path, folder: Path, targets: Sequence[str] = ("q_proj",), *, seed: int = 0
) -> Path:
    """A LoRA adapter on some projections of a model, with every weight drawn from the seed."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        loaded(base), peft.LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # A as well: peft draws it from the global generator
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder
