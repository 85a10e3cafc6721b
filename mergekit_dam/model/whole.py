"""Whole models, as transformers loads them: complete, or refused by name."""

from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from mergekit_dam.errors import DamError, first_line, listed
from mergekit_dam.model.named import REMEDY


def whole_model(name: str, dtype: str) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        name: Folder or Hub id.
        dtype: Dtype of its weights, or `auto` for the one in which they are stored.

    Raises:
        DamError: If it cannot be loaded, or a weight is missing.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, ...
        raise not_loaded("model", name, error) from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:  # transformers would draw them at random
        raise DamError(
            f"the model {name} has no weights for {listed(missing)}, which its config.json asks "
            f"for: {REMEDY}"
        )
    return model


def not_loaded(what: str, model: str, error: Exception) -> DamError:
    """The error that a model or its tokenizer cannot be loaded, with the library's reason."""
    reason = first_line(error)
    return DamError(
        f"the {what} of {model} cannot be loaded ({type(error).__name__}: {reason}): {REMEDY}"
    )
