"""Chunks of a stream."""

import pytest

from mergekit_dam.streams import stream as streams_module
from mergekit_dam.streams.share import Split
from mergekit_dam.streams.stream import Stream
from tests.kit.tensors import LENGTH, tokens_of


@pytest.mark.parametrize("split", ["fit", "held_out", None])
@pytest.mark.parametrize("held_out", [0, 1, 3])
def test_chunks_cover_every_sequence_of_a_split_once(
    split: Split | None, held_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, "CHUNK_TOKENS", 2 * LENGTH)
    stream = Stream.of_tokens(0, tokens_of(0, 7), held_out)
    covered = [i for chunk in stream.chunks(split) for i in range(7)[chunk]]
    border = 7 - held_out
    expected = {"fit": range(border), "held_out": range(border, 7), None: range(7)}[split]
    assert covered == list(expected)
    assert all(chunk.stop - chunk.start <= 2 for chunk in stream.chunks(split))
