"""Whole models, as transformers loads them: complete, or refused by name."""

import math
import re
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from mergekit_dam.errors import DamError, first_line, listed
from mergekit_dam.model.checkpoint import check_checkpoint

REMEDY = "name a folder with config.json, safetensors and tokenizer files, or a model on the Hub"


def require_model(name: str) -> None:
    """Refuse a name that is neither a folder with a model nor possibly an id on the Hub.

    Raises:
        DamError: With the remedy; also if the folder's weights are missing or damaged.
    """
    path = Path(name)
    if path.is_dir() and (path / "config.json").is_file():
        check_checkpoint(path)
    if path.is_dir():
        problem = None if (path / "config.json").is_file() else "is a folder without config.json"
    elif path.exists():
        problem = "is a file"
    else:
        may_be_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
        problem = None if may_be_id else "does not exist"
    if problem:
        raise DamError(f"the model {name} {problem}: {REMEDY}")


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


def require_finite_loss(loss: float, loaded: PreTrainedModel, *, model: str, text: str) -> None:
    """Refuse a loss that is no number, and say which weights are to blame."""
    if math.isfinite(loss):
        return
    weights = loaded.state_dict().items()
    wrong = [name for name, weight in weights if not weight.isfinite().all()]
    reason = (
        f"{listed(wrong)} {'has' if len(wrong) == 1 else 'have'} values that are not finite; take "
        f"another checkpoint"
        if wrong
        else "its weights are finite, so a sum overflows: pass `--dtype float32`"
    )
    raise DamError(f"the loss of {model} on {text} is {loss}: {reason}")


def not_loaded(what: str, model: str, error: Exception) -> DamError:
    """The error that a model or its tokenizer cannot be loaded, with the library's reason."""
    reason = first_line(error)
    return DamError(
        f"the {what} of {model} cannot be loaded ({type(error).__name__}: {reason}): {REMEDY}"
    )
