"""The tokenizer of each model, and a check that equal ids mean equal tokens in all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import has_file  # type: ignore[attr-defined]

from mergekit_dam.errors import CalibrationError, first_line

if TYPE_CHECKING:
    from mergekit.common import ModelPath, ModelReference

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_EXAMPLES = 3


def load_tokenizer(model: ModelReference, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`, local or from the Hub, at its revision.

    For `base+adapter` it is the adapter's if that has tokenizer files, otherwise the base's.

    Raises:
        CalibrationError: If there is none, or it cannot be loaded.
    """
    path = model.model
    if model.lora is not None and has_tokenizer(model.lora):
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


def check_agreement(
    tokenizers: Mapping[str, PreTrainedTokenizerBase], used: Mapping[str, Tensor]
) -> None:
    """Check that a token id means the same token in every model.

    Two tokenizers disagree if they give different tokens to one id, or different ids to one token.
    A token that only one model has, with an id that no other model uses, is no disagreement.
    Tokens that were added to a tokenizer (such as reserved ones that get a name later) only count
    if texts use them: if both texts use the id, or one text uses the token that has two ids.

    Args:
        tokenizers: Tokenizer of every model, by name.
        used: Ids of the text of each model that has one, from the model's own tokenizer.

    Raises:
        CalibrationError: With examples of the tokens that differ.
    """
    vocabularies = [
        _Vocabulary.of(own, used[model].flatten().tolist() if model in used else [])
        for model, own in tokenizers.items()
    ]
    conflicts: dict[tuple[str, str], list[str]] = {}
    for (first, one), (second, two) in combinations(zip(tokenizers, vocabularies, strict=True), 2):
        examples = [_example(one, two, conflict) for conflict in _conflicts(one, two)]
        if examples:
            conflicts[first, second] = examples
    if conflicts:
        raise CalibrationError(_disagreement(conflicts))


@dataclass(frozen=True)
class _Vocabulary:
    """A tokenizer's tokens by id and ids by token, its added ids, and the ids of its text."""

    tokens: Mapping[int, str]
    ids: Mapping[str, int]
    added: frozenset[int]
    used: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, used: Iterable[int]) -> _Vocabulary:
        ids = tokenizer.get_vocab()
        tokens = {token_id: token for token, token_id in ids.items()}
        return cls(tokens, ids, frozenset(tokenizer.added_tokens_decoder), frozenset(used))


def _conflicts(one: _Vocabulary, two: _Vocabulary) -> Iterator[int | str]:
    """Yield ids that mean two different tokens, then tokens that have two different ids."""
    reported_ids = set()
    for token_id in sorted(one.tokens.keys() & two.tokens.keys()):
        ordinary = token_id not in one.added and token_id not in two.added
        counts = ordinary or (token_id in one.used and token_id in two.used)
        if counts and one.tokens[token_id] != two.tokens[token_id]:
            reported_ids.add(token_id)
            yield token_id
    for token in sorted(one.ids.keys() & two.ids.keys(), key=one.ids.__getitem__):
        first, second = one.ids[token], two.ids[token]
        ordinary = first not in one.added and second not in two.added
        counts = ordinary or first in one.used or second in two.used
        if counts and first != second and not {first, second} & reported_ids:
            yield token


def _example(first: _Vocabulary, second: _Vocabulary, conflict: int | str) -> str:
    if isinstance(conflict, str):
        ids = first.ids[conflict], second.ids[conflict]
        return f"{conflict!r} is id {ids[0]} in one, id {ids[1]} in the other"
    tokens = first.tokens[conflict], second.tokens[conflict]
    return f"id {conflict} is {tokens[0]!r} in one, {tokens[1]!r} in the other"


def has_tokenizer(adapter: ModelPath) -> bool:
    """Whether an adapter has a tokenizer of its own.

    Raises:
        CalibrationError: If its files cannot be listed.
    """
    try:
        return any(
            has_file(adapter.path, name, revision=adapter.revision) for name in _TOKENIZER_FILES
        )
    except Exception as error:
        raise CalibrationError(
            f"the files of the adapter {adapter} cannot be listed: {first_line(error)}"
        ) from error


def _explain(error: Exception, path: ModelPath, trust_remote_code: bool) -> str:
    said = first_line(error)
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


def _disagreement(conflicts: Mapping[tuple[str, str], list[str]]) -> str:
    lines = [
        f"  - {first} and {second}: {len(examples):,} tokens differ, for example "
        + "; ".join(examples[:_EXAMPLES])
        for (first, second), examples in conflicts.items()
    ]
    return (
        "the models must give every token the same id, but their tokenizers disagree:\n"
        + "\n".join(lines)
        + "\nWrite `tokenizer: {source: union}` (or `base`, or a model), and mergekit makes one "
        "vocabulary for the merged model."
    )
