"""Rules that the fit and its estimate share: where things are kept, and how often they are used."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from transformers import MixtralConfig

from mergekit_dam.estimate import flops, memory
from mergekit_dam.estimate.inventory import Inventory, take_inventory
from mergekit_dam.estimate.memory import Room
from mergekit_dam.estimate.merge import plan_merge
from mergekit_dam.fitting.metric import Metric, kept_as_rows
from mergekit_dam.layers.experts import FEWEST, too_few
from mergekit_dam.search.descents import DESCENTS, descents
from mergekit_dam.search.pace import LOOKS, judged_steps
from mergekit_dam.search.sensitivity import gradient_sequences
from mergekit_dam.sources import network
from mergekit_dam.streams.storage import (
    SHARE,
    has_room,
    outputs_location,
    stream_location,
    streams_bytes,
)
from mergekit_dam.streams.stream import CHUNK_TOKENS, chunk_sequences, chunks
from tests.kit.merging import dam
from tests.kit.models import VOCAB_SIZE, Models, save_models
from tests.kit.texts import save_calibration

GB = 10**9
ROOM = Room(host=64 * GB, gpu=0, disk=100 * GB, baseline=0, libraries=0, shard=5 * GB)


def inventory(folder: Path, configuration: dict[str, Any]) -> Inventory:
    file = folder / "dam.yaml"
    file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
    LoaderCache.loaders.clear()
    return take_inventory(plan_merge(file, MergeOptions(quiet=True), folder / "out"))


class TestLocations:
    @pytest.mark.parametrize(
        ("gpu", "host", "location"),
        [(400, 400, "device"), (399, 400, "host"), (0, 400, "host"), (399, 399, "disk")],
    )
    def test_streams_are_as_near_to_the_device_as_there_is_room(
        self, gpu: int, host: int, location: str
    ) -> None:
        assert SHARE == 0.25
        assert stream_location("auto", 100, gpu=gpu, host=host) == location
        assert stream_location("disk", 100, gpu=gpu, host=host) == "disk"

    def test_outputs_stay_on_a_gpu_and_leave_the_memory_of_a_cpu(self) -> None:
        assert outputs_location("auto", gpu=True) == "device"
        assert outputs_location("auto", gpu=False) == "disk"
        assert outputs_location("host", gpu=True) == "host"

    def test_a_quarter_of_a_memory_is_room(self) -> None:
        assert has_room(25, 100)
        assert not has_room(26, 100)

    def test_an_estimate_puts_streams_where_the_merge_would(
        self, tmp_path: Path, llama_models: Models, calibration: tuple[Path, Path]
    ) -> None:
        found = inventory(tmp_path, dam(llama_models.models, calibration))
        size = streams_bytes(found.hidden, found.text.tokens)
        assert size == 3 * memory.stream_bytes(found)
        for gpu, host in ((4 * size, 1), (4 * size - 1, 4 * size), (1, 4 * size - 1)):
            room = replace(ROOM, gpu=gpu, host=host)
            expected = stream_location("auto", size, gpu=gpu, host=host)
            assert memory.stream_place(found, room) == expected


class TestCounts:
    @pytest.mark.parametrize("length", [1, 100, CHUNK_TOKENS, 3 * CHUNK_TOKENS])
    def test_chunks_have_as_many_sequences_as_are_said(self, length: int) -> None:
        size = chunk_sequences(length)
        first, second, last = chunks(0, 2 * size + 1, length)
        assert (first.stop - first.start, second.stop - second.start) == (size, size)
        assert last == slice(2 * size, 2 * size + 1)

    @pytest.mark.parametrize("steps", [1, 3, 8, 20, 400])
    def test_a_descent_is_judged_about_as_often_as_is_asked_for(self, steps: int) -> None:
        judged = judged_steps(steps)
        assert steps == max(judged)
        assert min(judged) >= 1
        assert len(judged) == {1: 1, 3: 3, 8: 8, 20: 10, 400: LOOKS}[steps]

    def test_a_descent_of_a_number_that_is_asked_for_is_the_only_one(self) -> None:
        assert descents(7) == (7,)
        assert descents(None) == DESCENTS

    def test_metrics_are_made_of_the_first_sequences(self) -> None:
        assert gradient_sequences(5, 16, tokens=40) == 2
        assert gradient_sequences(1, 16, tokens=40) == 1
        assert gradient_sequences(5, 100, tokens=40) == 1

    @pytest.mark.parametrize(("tokens", "rows"), [(4, True), (5, False)])
    def test_a_metric_of_few_tokens_is_kept_as_their_gradients(
        self, tokens: int, rows: bool
    ) -> None:
        metric = Metric.of_gradients(torch.randn(tokens, 8))
        assert metric.is_matrix != rows
        assert kept_as_rows(tokens, 8) == rows


class TestResidentWeights:
    @pytest.fixture
    def found(
        self, tmp_path: Path, llama_models: Models, calibration: tuple[Path, Path]
    ) -> Inventory:
        return inventory(tmp_path, dam(llama_models.models, calibration, metric="sensitivity"))

    def test_weights_stay_as_long_as_half_of_a_gpu_is_free(self, found: Inventory) -> None:
        loaded = [sum(tensor.loaded for tensor in part.tensors) for part in found.parts]
        whole = sum(loaded)
        for gpu, kept in ((100 * whole, whole), (12 * min(loaded), 0)):
            on_gpu, _ = memory.kept_by_place(found, replace(ROOM, gpu=gpu))
            assert on_gpu == kept

    def test_blocks_that_a_gpu_has_no_room_for_stay_on_the_host(self, found: Inventory) -> None:
        blocks = sum(tensor.loaded for part in found.blocks for tensor in part.tensors)
        largest = max(sum(t.loaded for t in part.tensors) for part in found.blocks)
        small = replace(ROOM, gpu=8 * largest - 1)
        assert memory.kept_by_place(found, small)[1] == blocks
        assert memory.held_bytes(found.blocks[0], found, small) < largest

    def test_they_leave_room_for_the_fit_of_a_stage(self) -> None:
        for free, size, fits in ((61, 5, True), (60, 5, False), (51, 4, True), (50, 4, False)):
            assert network.has_room(free, 100, size) == fits

    def test_pages_of_files_stay_unless_there_are_too_many(self, found: Inventory) -> None:
        whole = sum(tensor.loaded for part in found.parts for tensor in part.tensors)
        assert memory.kept_weights(found, replace(ROOM, host=whole)) == whole
        assert memory.kept_weights(found, replace(ROOM, host=whole - 1)) == 0


class TestExperts:
    def test_experts_that_few_tokens_are_sent_to_are_not_fitted(self) -> None:
        assert too_few(FEWEST - 1, "routed")
        assert not too_few(FEWEST, "routed")
        assert not too_few(0, "all")

    @pytest.mark.parametrize(
        ("samples", "fed", "fitted"),
        [(2, "routed", False), (2, "all", True), (40, "routed", True)],
    )
    def test_an_estimate_leaves_them_out_too(
        self, tmp_path: Path, samples: int, fed: str, fitted: bool
    ) -> None:
        config = MixtralConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            num_local_experts=4,
            num_experts_per_tok=1,
        )
        models = save_models(tmp_path, config, count=2)
        text = save_calibration(tmp_path / "text.jsonl")
        found = inventory(tmp_path, dam(models.models, [text] * 2, samples=samples, experts=fed))
        (block,) = found.blocks
        dense = replace(block, groups=tuple(g for g in block.groups if g[0].kind != "experts"))
        with_experts, without = (
            flops.layer_fit(part, found, kept=True, sensitivity=False) for part in (block, dense)
        )
        key = ("solves", "cholesky")
        assert (with_experts[key] > without[key]) == fitted  # type: ignore[index]
