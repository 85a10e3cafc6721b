"""The tokenizer of each model, and whether the tokenizers of several mean the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import has_file

from mergekit_dam.errors import CalibrationError

if TYPE_CHECKING:
    from mergekit.common import ModelPath, ModelReference

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_EXAMPLES = 3


def load_tokenizer(model: ModelReference, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`, local or from the Hub, at its revision.

    For `base+adapter` it is the adapter's if that has tokenizer files, else the base's.
    Raises CalibrationError if there is none, or it cannot be loaded.
    """
    path = model.model
    if model.lora is not None and _has_tokenizer(model.lora):
        path = model.lora
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path.path, revision=path.revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # OSError, ValueError, KeyError, ImportError, remote code
        raise CalibrationError(_explain(error, path, trust_remote_code)) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not len(tokenizer):
        raise CalibrationError(f"{path} has no tokenizer with tokens in it: add its tokenizer.json")
    return tokenizer


def check_agreement(tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> None:
    """Raise CalibrationError unless a token id means the same token in every model.

    Keys are the models' names. Two tokenizers disagree where they give different tokens to
    one id, or different ids to one token. Tokens that only one model has, on ids that no
    other model uses, are no disagreement.
    """
    by_id: dict[int, tuple[str, str]] = {}  # id -> (token, the first model that has it)
    by_token: dict[str, tuple[int, str]] = {}
    conflicts: dict[tuple[str, str], list[str]] = {}
    for model, tokenizer in tokenizers.items():
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        for token, token_id in vocabulary:
            other_token, owner = by_id.setdefault(token_id, (token, model))
            if other_token != token:
                example = f"id {token_id} is {other_token!r} in one, {token!r} in the other"
                conflicts.setdefault((owner, model), []).append(example)
                continue
            other_id, owner = by_token.setdefault(token, (token_id, model))
            if other_id != token_id:
                example = f"{token!r} is id {other_id} in one, id {token_id} in the other"
                conflicts.setdefault((owner, model), []).append(example)
    if conflicts:
        raise CalibrationError(_disagreement(conflicts))


def _has_tokenizer(adapter: ModelPath) -> bool:
    try:
        return any(
            has_file(adapter.path, name, revision=adapter.revision) for name in _TOKENIZER_FILES
        )
    except Exception as error:
        raise CalibrationError(
            f"the files of the adapter {adapter} cannot be listed: {_said(error)}"
        ) from error


def _explain(error: Exception, path: ModelPath, trust_remote_code: bool) -> str:
    said = _said(error)
    remedy = (
        "check the path or id; a model saved without its tokenizer needs the tokenizer files "
        "(tokenizer.json, tokenizer_config.json) of the model that it was trained from"
    )
    if not trust_remote_code and "trust_remote_code" in str(error):
        remedy = "its tokenizer is code from the Hub: if you trust it, pass --trust-remote-code"
    return (
        f"the tokenizer of {path} cannot be loaded, and calibration text is read with it "
        f"({type(error).__name__}: {said}): {remedy}"
    )


def _said(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _disagreement(conflicts: Mapping[tuple[str, str], list[str]]) -> str:
    lines = [
        f"  - {first} and {second}: {len(examples):,} tokens differ, for example "
        + "; ".join(examples[:_EXAMPLES])
        for (first, second), examples in conflicts.items()
    ]
    return (
        "the models must give every token the same id, but their tokenizers disagree:\n"
        + "\n".join(lines)
        + "\nMerge only models with the same vocabulary, or align one to the other first with "
        "mergekit-tokensurgeon."
    )
