"""The bytes that are asked for ahead of time are those that will be read, and no more."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from mergekit_dam.host import tasks
from mergekit_dam.host.headers import Header, _read_headers
from mergekit_dam.sources import network
from mergekit_dam.sources.readahead import Span, read_ahead
from tests.kit.merging import dam, merge, tensors_of
from tests.kit.models import save_models, tiny_llama_config
from tests.kit.reads import watched_reads
from tests.kit.texts import save_calibration


def spans(path: Path) -> dict[str, Span]:
    """Where the tensors of a file lie."""
    headers = _read_headers(str(path.parent), (path.name,))
    return {name: span(header) for name, header in headers.items()}


def span(header: Header) -> Span:
    return Span(header.file, header.offset, header.length)


def test_spans_are_the_bytes_of_the_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.zeros(0)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found = spans(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        span = found[name]
        raw = path.read_bytes()[span.offset : span.offset + span.length]
        assert raw == tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_a_file_that_is_gone_troubles_nobody(tmp_path: Path) -> None:
    read_ahead([Span(tmp_path / "none", 0, 10)])


def test_a_process_ends_although_a_disk_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    program = (
        "import os, pathlib, sys, threading\n"
        "from mergekit_dam.sources.readahead import Span, read_ahead\n"
        "asked = threading.Event()\n"
        "def never(*_):\n"
        "    asked.set()\n"
        "    threading.Event().wait()\n"
        "os.posix_fadvise = never\n"
        "read_ahead([Span(pathlib.Path(sys.argv[1]), 0, 1)])\n"
        "assert asked.wait(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "file")]
    assert subprocess.run(command, timeout=120, check=False).returncode == 0


@pytest.mark.parametrize("metric", ["identity", "sensitivity"])
def test_the_next_weights_of_a_sweep_are_asked_for(metric: str, tmp_path: Path) -> None:
    models = save_models(tmp_path, tiny_llama_config(num_hidden_layers=3), count=2)
    text = save_calibration(tmp_path / "text.jsonl")
    asked: list[Span] = []

    def note(spans: Iterable[Span]) -> None:
        asked.extend(spans)

    config = dam(
        models.models,
        [text, text],
        base=models.base,
        objective="layer",
        metric=metric,
    )
    with (
        mock.patch.object(network, "read_ahead", note),
        mock.patch.object(tasks, "read_ahead", note),
        watched_reads() as reads,
    ):
        merge(config, tmp_path / "out")
    names = {
        (span.path.parent.as_posix(), name)
        for folder in {Path(folder) for folder, _ in reads.order}
        for name, span in spans(folder / "model.safetensors").items()
        if span in asked
    }
    first = {"model.embed_tokens.weight"}
    assert len({folder for folder, _ in names}) == 3
    assert {name for _, name in names} == tensors_of(models.base).keys() - first
    if metric == "identity":  # one sweep
        assert len(asked) == len(set(asked))
