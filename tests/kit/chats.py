"""Chats in the forms in which tools store them, and the texts that they are."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from mergekit_dam.calibration.sets import CalibrationSet

Turns = tuple[tuple[str, str], ...]
"""(role, content) of every message."""


def chats(count: int) -> list[Turns]:
    """Chats of two messages, each of other words."""
    return [(("user", f"add {i} and 2"), ("assistant", f"{i} + 2 = {i + 2}")) for i in range(count)]


def openai(turns: Turns) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(turns: Turns) -> list[dict[str, Any]]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(role, role), "value": content} for role, content in turns]


def rendered(turns: Turns) -> str:
    """What the template `tests.kit.tokenizers.CHAT` makes of a chat."""
    return "<s>" + "".join(f"[{role}] {content}</s>" for role, content in turns)


def require_all(
    load: Any, source: str, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> CalibrationSet:
    """Load a source as a whole, and compare its documents and tokens with those of `texts`.

    Args:
        load: The fixture `load`.
        source: The value of `calibration`.
        texts: The text of every document, with special tokens, in any order.
        tokenizer: Tokenizer of the model.
    """
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    total = sum(map(len, ids))
    loaded: CalibrationSet = load(
        source, tokenizer=tokenizer, samples=1, sequence_length=total, vocab_size=1000
    )
    assert loaded.provenance.documents_read == len(texts)
    assert loaded.provenance.tokens_available == total
    start = tokenizer.bos_token_id
    found: list[list[int]] = []
    for token in loaded.tokens.flatten().tolist():
        if token == start:
            found.append([])
        found[-1].append(token)
    assert sorted(found) == sorted(ids)
    return loaded
