"""One merge, or the differences of two, as tables for people."""

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mergekit_dam.inspection.difference import Difference
from mergekit_dam.inspection.summary import Summary
from mergekit_dam.tables import aligned

_MOST = 12
"""Layers that are listed of a difference."""

_DIGEST = re.compile(r"[0-9a-f]{64}")

_LEGEND = (
    "Mean coefficients by layer; `largest` is the share of columns in which a model has the "
    "largest one. `spread` is how much coefficients of one tensor differ, and `correction` the "
    "root mean square of what is added to the merged weights."
)


def summary_table(summary: Summary, width: int) -> str:
    """A merge for people.

    Args:
        summary: The merge.
        width: Columns of the terminal.
    """
    names = _short(summary.sources)
    head = ["mean coefficient", *names, "largest", "spread", "correction"]
    rows = [
        [
            own.layer,
            *map(_number, own.means),
            _largest(names, own.dominates),
            _number(own.spread),
            "-" if own.correction is None else f"{own.correction:.1e}",
        ]
        for own in summary.layers
    ]
    largest = _largest(names, summary.dominates)
    rows.append(["all", *map(_number, summary.means), largest, "", ""])
    facts = [
        f"{len(summary.sources)} sources: {', '.join(summary.sources)}",
        f"{sum(own.tensors for own in summary.layers)} tensors, {summary.columns:,} coefficients "
        f"of each source; corrections: {summary.correction_bytes / 1e6:.2f} MB",
        f"parameters: {_values(summary.metadata.get('parameters'))}",
        f"made by mergekit-dam {(summary.metadata.get('versions') or {}).get('mergekit-dam')}",
    ]
    lines = [textwrap.fill(fact, width, subsequent_indent="  ") for fact in facts]
    return "\n".join([*lines, "", aligned(head, rows, width), "", textwrap.fill(_LEGEND, width)])


def difference_table(found: Difference, width: int) -> str:
    """The differences of two merges for people.

    Args:
        found: The differences.
        width: Columns of the terminal.
    """
    parts = ["\n".join(_origin(found, width))]
    if found.layers:
        rows = [
            [own.layer, f"{own.rms:.4f}", f"{own.largest:.4f}", own.tensor.removesuffix(".weight")]
            for own in found.layers[:_MOST]
        ]
        parts.append(aligned(["difference", "rms", "largest", "in"], rows, width))
        more = len(found.layers) - _MOST
        if more > 0:
            parts.append(f"and {more} more layers that differ less")
    for path, names in zip(found.paths, found.only, strict=True):
        if names:
            parts.append(f"only in {path}: {len(names)} tensors, {', '.join(names[:3])}")
    if found.unlike:
        parts.append(f"of other sizes: {', '.join(found.unlike[:3])}")
    equal = f"layers with equal coefficients: {found.equal} of {found.equal + len(found.layers)}"
    return "\n\n".join([part for part in parts if part] + [equal])


def _origin(found: Difference, width: int) -> Iterator[str]:
    entries: list[tuple[str, Any, Any]] = list(found.origin)
    if found.sources[0] != found.sources[1]:
        one, other = (", ".join(own) for own in found.sources)
        entries.insert(0, ("models", one, other))
    for name, first, second in entries:
        lines = f"{name}: {_value(first)} -> {_value(second)}"
        yield textwrap.fill(lines, width, subsequent_indent="  ")


def _largest(names: Sequence[str], shares: Sequence[float]) -> str:
    share = max(shares)
    return f"{names[list(shares).index(share)]} {share:.0%}"


def _short(sources: Sequence[str]) -> list[str]:
    last = [Path(source).name or source for source in sources]
    return [own if last.count(own) == 1 else s for own, s in zip(last, sources, strict=True)]


def _number(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"


def _values(parameters: Any) -> str:
    return ", ".join(f"{k}: {_value(v)}" for k, v in (parameters or {}).items()) or "the defaults"


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return value[:12] if isinstance(value, str) and _DIGEST.fullmatch(value) else str(value)
