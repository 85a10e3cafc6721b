"""What a backend was given of a merge, read back."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2 as protocol

Curve = list[tuple[int, float]]
"""Steps and values."""


@dataclass
class Noted:
    """A backend that keeps everything in memory.

    Attributes:
        failing: an error that it raises from now on.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    closed: list[bool] = field(default_factory=list)
    failing: Exception | None = None

    def put(self, group: str, values: Mapping[str, float], step: int) -> None:
        if self.failing is not None:
            raise self.failing
        for name, value in values.items():
            self.curves.setdefault(f"{group}/{name}", []).append((step, value))

    def close(self, *, failed: bool) -> None:
        self.closed.append(failed)


def curves_of(run: Path) -> dict[str, Curve]:
    """The curves of a run in a folder of TensorBoard, as TensorBoard reads them."""
    events = EventAccumulator(str(run))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def text_of(run: Path, tag: str) -> str:
    """A text of a run in a folder of TensorBoard."""
    events = EventAccumulator(str(run))
    events.Reload()
    (event,) = events.Tensors(f"{tag}/text_summary")
    text: str = event.tensor_proto.string_val[0].decode()
    return text


@contextmanager
def offline_wandb(folder: Path) -> Iterator[None]:
    """W&B without a network, which keeps its runs in a folder; it reads its environment once."""
    own = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder)}
    wandb.teardown()
    with mock.patch.dict(os.environ, own):
        yield
        wandb.teardown()


def curves_of_wandb(folder: Path) -> dict[str, Curve]:
    """The curves of the only offline run in a folder of W&B."""
    curves: dict[str, Curve] = {}
    for record in _records(folder):
        row = {".".join(own.nested_key) or own.key: own.value_json for own in record.history.item}
        for name, value in row.items():
            group, _, rest = name.partition("/")
            if rest and rest != "step":
                step = int(row[f"{group}/step"])
                curves.setdefault(name, []).append((step, float(json.loads(value))))
    return curves


def exit_code_of_wandb(folder: Path) -> int:
    """How the only offline run in a folder of W&B says that it ended."""
    (code,) = [own.exit.exit_code for own in _records(folder) if own.HasField("exit")]
    return int(code)


def _records(folder: Path) -> Iterator[Any]:
    """Records of a log in LevelDB's format: blocks of 32 KiB, of which none is full here."""
    wandb.teardown()  # its own process writes the file, and has not always done so before
    (file,) = folder.rglob("*.wandb")
    content = file.read_bytes()
    assert len(content) < 2**15
    start = 7  # the header of the file
    while start < len(content):
        length = int.from_bytes(content[start + 4 : start + 6], "little")
        record = protocol.Record()  # type: ignore[attr-defined]
        record.ParseFromString(content[start + 7 : start + 7 + length])
        yield record
        start += 7 + length
