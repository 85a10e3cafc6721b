"""LoRA adapters with known weights."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.kit.models import loaded


def save_adapter(
    base: Path,
    folder: Path,
    targets: Sequence[str] = ("q_proj",),
    *,
    seed: int = 0,
    rows: int | None = None,
) -> Path:
    """A LoRA adapter on some projections of a model, with every weight drawn from the seed.

    Args:
        rows: rows of the embedding and the head that it was trained with, if not the base's.
    """
    peft = pytest.importorskip("peft")
    own = loaded(base)
    if rows is not None:
        own.resize_token_embeddings(rows, mean_resizing=False)
    settings = peft.LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's
        model = peft.get_peft_model(own, settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # A as well: peft draws it from the global generator
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, save_embedding_layers=rows is not None)
    return folder
