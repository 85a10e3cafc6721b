"""The documented table of architectures.

python -m tests.architectures.table            # merges all cases, and writes the table
python -m tests.architectures.table NAME ...   # merges some cases, and says what was seen
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import transformers as tf
from mergekit.architecture.json_definitions import NAME_TO_ARCH

from tests.architectures.cases import CASES
from tests.architectures.seen import Seen, see
from tests.kit.texts import save_token_ids

DOCUMENT = Path(__file__).parents[2] / "examples" / "architectures.md"
_BEGIN, _END = "| what `dam` does |", "\n\n"
LOST = "\\*"
"""Marks what mergekit's own `linear` loses weights of."""


def table(all_seen: Sequence[Seen]) -> str:
    """The documented table of architectures."""
    cells: dict[str, dict[bool, dict[str, None]]] = {}
    for seen in sorted(all_seen, key=lambda s: (s.row.startswith("refused"), s.row != "fitted")):
        title = seen.case.title + (LOST if seen.linear == "loses weights" else "")
        cells.setdefault(seen.row, {}).setdefault(seen.defined, {})[title] = None
    unknown = sorted(
        name for name in NAME_TO_ARCH if not hasattr(tf, name) and not name.startswith("_")
    )
    cells["refused: transformers 5 has no class of this name"] = {True: dict.fromkeys(unknown)}
    rows = [
        f"| {row} | {', '.join(own.get(True, ()))} | {', '.join(own.get(False, ()))} |"
        for row, own in cells.items()
    ]
    head = [f"{_BEGIN} mergekit defines | mergekit infers |", "|---|---|---|"]
    return "\n".join([*head, *rows])


def written_table() -> str:
    """The table that the document has."""
    text = DOCUMENT.read_text(encoding="utf-8")
    return text[text.index(_BEGIN) : text.index(_END, text.index(_BEGIN))]


def main(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in CASES]
    if unknown:
        sys.exit(f"required names of cases, got {', '.join(unknown)}; there are {', '.join(CASES)}")
    with tempfile.TemporaryDirectory() as folder:
        texts = save_token_ids(Path(folder))
        seen = []
        for name in names or CASES:
            seen.append(see(CASES[name], Path(folder) / name, texts))
            print(name, seen[-1].linear, "|", seen[-1].row, "|", seen[-1].refusal or "", flush=True)
    if names:
        return
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(text.replace(written_table(), table(seen)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
