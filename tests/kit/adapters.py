"""LoRA adapters with known weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.kit.families import loaded
from tests.kit.models import make_model, make_tokenizer, tiny_llama_config


def save_adapter(base: Path, folder: Path, targets: Sequence[str], *, seed: int) -> Path:
    """A LoRA adapter with every weight drawn from a seed."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        loaded(base), peft.LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_query_adapter(base: Path, folder: Path) -> Path:
    """A LoRA adapter on the query projections of a model."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        make_model(tiny_llama_config()).from_pretrained(base),
        peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # A as well: peft draws it from whatever state torch is in
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder
