"""Losses of a model that is in memory as a whole."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from mergekit_dam.evaluation.settings import EvaluationSettings
from mergekit_dam.model.whole import whole_model

LOGITS_AT_ONCE = 2**28
"""Most elements of logits at once: 1 GiB in fp32."""


def load_model(name: str, settings: EvaluationSettings) -> PreTrainedModel:
    """Load a model for evaluation, on its device.

    Raises:
        DamError: If it cannot be loaded, or a weight is missing.
    """
    transformers_logging.disable_progress_bar()  # an evaluation tells its progress itself
    model = whole_model(name, settings.dtype)
    torch.nn.Module.to(model.eval(), settings.device)  # in place; transformers' `to` is untyped
    return model


def cross_entropy(model: PreTrainedModel, tokens: Tensor, *, batch_size: int) -> float:
    """Mean of -log p(token | tokens before it) over all predicted positions, in nats.

    Args:
        tokens: int64 `[sequences, sequence_length]`; all positions but the first are predicted.
        batch_size: Sequences per forward pass, as in `losses_of_whole`.
    """
    return losses_of_whole(model, tokens, batch_size=batch_size).mean().item()


@torch.inference_mode()
def losses_of_whole(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    counted: Tensor | None = None,
    batch_size: int,
    done: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """The mean loss of every sequence, in nats per token: fp64 `[sequences]` on the CPU.

    Args:
        tokens: int64 `[sequences, sequence_length]`; all positions but the first are predicted.
        counted: Which of these predictions count, bool `[sequences, sequence_length - 1]`; None if
            all do.
        batch_size: Sequences per forward pass; lowered until their logits have at most
            `LOGITS_AT_ONCE` elements, though never below one sequence.
        done: Called after every batch with its number of sequences.
    """
    length = tokens.shape[1]
    vocabulary = model.config.get_text_config().vocab_size
    rows = max(1, min(batch_size, LOGITS_AT_ONCE // (length * vocabulary)))
    marks = torch.ones_like(tokens[:, 1:]).bool() if counted is None else counted
    batches = zip(torch.split(tokens, rows), torch.split(marks, rows), strict=True)
    found = []
    for own, inside in batches:
        batch = own.to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits
        # Only one sequence's logits are copied to fp32 at a time.
        for row, targets, mark in zip(logits, batch, inside.to(logits.device), strict=True):
            found.append(position_losses(row[:-1], targets[1:])[mark].mean())
        done(len(batch))
    return torch.stack(found).cpu()


def position_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of every position, fp64 `[positions]`.

    Args:
        logits: `[positions, vocabulary]`.
        targets: The tokens that come next, int64 `[positions]`.
    """
    return functional.cross_entropy(logits.float(), targets, reduction="none").double()
