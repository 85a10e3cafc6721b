"""Where in the text of a chat the assistant's turns are."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Span = tuple[int, int]
"""Characters `[start, stop)` of a text."""

Apply = Callable[[Sequence[Any], bool], str]
"""(messages, whether to invite an answer) -> the text that a chat template makes of them."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def marks_turns(template: str) -> bool:
    """Whether a chat template says itself what the assistant writes."""
    return _GENERATION.search(template) is not None


def masked_spans(mask: Iterable[int], offsets: Iterable[Span]) -> tuple[Span, ...]:
    """The characters of the tokens that a mask selects.

    Args:
        mask: 1 for tokens of the assistant, else 0.
        offsets: Characters of every token.
    """
    spans: list[Span] = []
    before = 0
    for own, (start, stop) in zip(mask, offsets, strict=True):
        if own and before:
            spans[-1] = (spans[-1][0], stop)
        elif own:
            spans.append((start, stop))
        before = own
    return tuple(spans)


def turns_by_prefixes(whole: str, messages: Sequence[Any], apply: Apply) -> tuple[Span, ...] | None:
    """The assistant's turns as differences between texts with and without each message.

    A turn begins where the text of the messages before it, with the template's invitation to
    answer, ends. It ends where the text of the messages up to it ends; where a template writes
    the last message in another way, it ends where what follows begins in the text without it.

    Args:
        whole: The text of all messages.
        messages: The messages as the template reads them.
        apply: The template; it may raise anything.

    Returns:
        None if a turn cannot be found.
    """
    spans = []
    for number, message in enumerate(messages):
        # Where nobody asked, nothing can be told: templates do not write empty chats.
        if message.get("role") != "assistant" or number == 0:
            continue
        try:
            span = _turn(whole, messages, number, apply)
        except Exception:  # a template is a program: it may raise anything
            span = None
        if span is None:
            return None
        spans.append(span)
    return tuple(spans)


def _turn(whole: str, messages: Sequence[Any], number: int, apply: Apply) -> Span | None:
    before = apply(messages[:number], False)
    if not whole.startswith(before):
        return None
    invited = apply(messages[:number], True)
    start = _alike(whole, invited)
    upto = apply(messages[: number + 1], False)
    if whole.startswith(upto):
        stop = len(upto)
    else:
        without = apply([*messages[:number], *messages[number + 1 :]], False)
        if not (without.startswith(before) and whole.endswith(without[len(before) :])):
            return None
        stop = len(whole) - len(without) + len(before)
    return (start, stop) if len(before) <= start < stop else None


def _alike(one: str, other: str) -> int:
    """Number of characters at the beginning that two texts share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def covered(spans: Sequence[Span], offsets: Sequence[Span], length: int) -> list[bool]:
    """Which tokens lie in spans of a text, in part at least.

    Args:
        spans: Spans of the text.
        offsets: Characters of every token; white space may have been cut off.
        length: Characters of the text.
    """
    inside = bytearray(length)
    for start, stop in spans:
        inside[start:stop] = b"\1" * (stop - start)
    return [
        # Of a token of white space, nothing but its end may be left.
        any(inside[start:stop]) or (start == stop > 0 and bool(inside[stop - 1]))
        for start, stop in offsets
    ]
