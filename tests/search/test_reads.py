"""Reads of a search, and how much of them is in memory."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mergekit_dam.search.gradient import Objective
from mergekit_dam.search.judge import verdict_of
from mergekit_dam.search.survey import survey
from mergekit_dam.sources import network as network_module
from mergekit_dam.streams.boundaries import BoundaryStates
from tests.kit.merging import tensors_of
from tests.kit.models import Models, save_models, tiny_llama_config
from tests.kit.networks import CountedNetwork, make
from tests.kit.reads import watched_reads
from tests.kit.searches import polished
from tests.kit.settings import logits_settings
from tests.kit.texts import save_calibration


def read_counts(
    folder: Path, layers: int, **changes: Any
) -> tuple[Models, Counter[tuple[str, str]], int, int]:
    """Reads of every tensor, the most bytes alive, and what was alive at the end."""
    models = save_models(folder, tiny_llama_config(num_hidden_layers=layers), count=2)
    text = save_calibration(folder / "text.jsonl")
    with watched_reads() as reads:
        polished(models, [text, text], folder / "out", changes)
    return models, Counter(reads.order), reads.peak, reads.live


def test_resident_weights_are_read_once_and_once_to_be_written(tmp_path: Path) -> None:
    _, counts, _, live = read_counts(tmp_path, 3, resident="always")
    assert set(counts.values()) == {2}
    assert live == 0


@pytest.mark.parametrize("metric", ["identity", "sensitivity"])
def test_without_room_one_stage_of_all_models_is_in_memory(
    metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_module, "has_room", lambda *_: False)
    models, counts, peak, live = read_counts(tmp_path, 5, resident="auto", metric=metric)
    sizes = [
        sum(t.nbytes for name, t in tensors_of(models.base).items() if name.startswith(parts))
        for parts in ("model.embed_tokens", "model.layers.0.", ("model.norm", "lm_head"))
    ]
    assert peak == 3 * max(sizes)
    assert live == 0
    blocks = {count for (_, name), count in counts.items() if ".layers." in name}
    assert len(blocks) == 1


def reads_of(network: CountedNetwork) -> list[int]:
    """How often each stage was read since the last time this was asked."""
    found, network.reads = network.reads, [0] * len(network.stages)
    return found


def test_a_sweep_reads_a_stage_once_and_a_step_twice(tmp_path: Path) -> None:
    made = make(base=True)
    network = made.network("never")
    boundaries = BoundaryStates(tmp_path)
    surveyed = survey(network, made.streams(), made.average(), boundaries, teachers=True)
    assert reads_of(network) == [1, 1, 1, 0]
    assert len(surveyed.taught) == 2
    verdict_of(network, made.average(), made.data())
    assert reads_of(network) == [1] * 4
    objective = Objective(network, made.coordinates, logits_settings(), BoundaryStates(tmp_path))
    for _ in range(3):
        objective(made.average(), made.batches())
        assert reads_of(network) == [2, 2, 2, 1]
    resident = made.network("always")
    objective = Objective(resident, made.coordinates, logits_settings(), BoundaryStates(tmp_path))
    for _ in range(3):
        objective(made.average(), made.batches())
    assert reads_of(resident) == [1] * 4
