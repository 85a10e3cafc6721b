"""Run merges one after the other, and count the tokens that each process runs.

torchrun --nproc-per-node 2 -m tests.kit.worker FOLDER DEVICE

FOLDER/merges.json has configurations by name. The merge goes to FOLDER/NAME, and the number of
tokens that each process ran for it to FOLDER/tokens-RANK.json.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from mergekit_dam.host import plugin
from mergekit_dam.model.decoder import Decoder
from mergekit_dam.streams import stream as streams

COUNTED = {"embed": 1, "run_block": 2, "logits": 1}
"""Ways to run a part, and the position of what enters it."""


@contextlib.contextmanager
def counted_tokens() -> Iterator[dict[str, int]]:
    """Count the tokens that run through parts of a model while the body runs.

    One sequence runs at a time: then one process and two round the same products.
    """
    counts = dict.fromkeys(COUNTED, 0)

    def counting(name: str, position: int) -> Any:
        stock = getattr(Decoder, name)

        def run(*args: Any) -> Any:
            entering = args[position + 1]
            counts[name] += entering.shape[0] * entering.shape[1]
            return stock(*args)

        return mock.patch.object(Decoder, name, run)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(streams, "CHUNK_TOKENS", 1))
        for name, position in COUNTED.items():
            stack.enter_context(counting(name, position))
        yield counts


def main(folder: Path, device: str) -> None:
    plugin.install()
    from tests.kit.merging import merge

    tokens = {}
    for name, configuration in json.loads((folder / "merges.json").read_text("utf-8")).items():
        with counted_tokens() as counts:
            merge(configuration, folder / name, device=device)
        tokens[name] = counts
    file = folder / f"tokens-{os.environ['RANK']}.json"
    file.write_text(json.dumps(tokens), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
