"""Damaged files: strategies of hypothesis that change bytes, and values in trees of JSON."""

import copy
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from hypothesis import strategies as st

NAMES = ("", "../x", "/etc/passwd", "a/../../x", "x\0y", "\ud800", "~", "é", "x" * 300, "__file__")
"""Texts that are trouble as names: paths that lead out, no UTF-8, too long."""

_NUMBERS = (0, 1, -1, 2**31, 2**63, -(2**63), 10**40, 0.0, -0.5, 1e308, float("inf"), float("nan"))

leaves: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([None, True, False, [], {}, *_NUMBERS, *NAMES]),
    st.text(max_size=8),
    st.integers(),
    st.floats(),
)
values = st.recursive(
    leaves,
    lambda own: st.lists(own, max_size=4) | st.dictionaries(st.text(max_size=6), own, max_size=4),
    max_leaves=8,
)
"""Any value of JSON; NaN and infinity are among them, as Python reads and writes them."""

deep = st.sampled_from(["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000])
"""JSON that is nested deeper than any stack."""


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a tree with a key or an index in it."""
    keys = tree if isinstance(tree, Mapping) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """A copy of a tree with one to three values replaced, removed or renamed."""
    own = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(own))
        if not places:
            return draw(values)
        inside, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if change == "replace":
            inside[key] = draw(values)
        elif change == "remove":
            del inside[key]
        elif isinstance(inside, dict):
            inside[draw(st.sampled_from(NAMES) | st.text(max_size=5))] = inside.pop(key)
    return own


def changed_json(tree: Any) -> st.SearchStrategy[bytes]:
    """The text of a JSON file with some values changed, or with some bytes damaged."""
    text = json.dumps(tree).encode()
    return st.one_of(
        changed(tree).map(lambda own: json.dumps(own).encode()),
        values.map(lambda own: json.dumps(own).encode()),
        damaged(text),
        deep.map(str.encode),
    )


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with one to three damages: cut off, bytes replaced, put in, taken out or doubled."""
    own = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(own)))
        end = min(len(own), start + draw(st.integers(0, 16)))
        damage = draw(st.sampled_from(["cut", "replace", "insert", "remove", "double"]))
        if damage == "cut":
            del own[start:]
        elif damage == "double":
            own[start:start] = own[start:end]
        elif damage == "remove":
            del own[start:end]
        else:
            own[start : end if damage == "replace" else start] = draw(st.binary(max_size=16))
    return bytes(own)


def safetensors_bytes(header: Any, payload: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header: a tree, or bytes as they are.

    Args:
        length: Length of the header that the file gives, if that is not the true one.
    """
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


@st.composite
def changed_safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file whose header, its length or any bytes are changed."""
    (length,) = struct.unpack("<Q", content[:8])
    header, payload = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind = draw(st.sampled_from(["header", "metadata", "length", "bytes", "deep", "any"]))
    if kind == "header":
        return safetensors_bytes(draw(changed(header)), payload)
    if kind == "metadata":
        own = {
            key: json.dumps(draw(changed(json.loads(text)))) if text[:1] == "{" else draw(st.text())
            for key, text in header.get("__metadata__", {}).items()
        }
        return safetensors_bytes({**header, "__metadata__": own}, payload)
    if kind == "length":
        lengths = st.sampled_from([0, 1, 2**31, 2**40, 2**63, 2**64 - 1]) | st.integers(0, 999)
        return struct.pack("<Q", draw(lengths)) + content[8:]
    if kind == "deep":
        return safetensors_bytes(draw(deep).encode(), payload)
    if kind == "any":
        return safetensors_bytes(draw(values), payload)
    return draw(damaged(content))
