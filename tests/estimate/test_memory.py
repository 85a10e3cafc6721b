"""Estimated bytes and memory, and what is said when they do not fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mergekit_dam.estimate import memory
from mergekit_dam.estimate.disk import disk_bytes
from mergekit_dam.estimate.inventory import Inventory
from mergekit_dam.estimate.memory import Room
from mergekit_dam.estimate.report import table
from mergekit_dam.estimate.sweeps import sweeps
from tests.kit.estimates import GB, ROOM, SPEEDS, inventory, planned_estimate
from tests.kit.merging import dam, merge
from tests.kit.models import Models, save_models, tiny_llama_config
from tests.kit.reads import watched_reads
from tests.kit.texts import save_calibration


class TestBytes:
    def test_a_merge_of_one_sweep_reads_what_is_said(
        self, tmp_path: Path, llama_models: Models, calibration: tuple[Path, Path]
    ) -> None:
        configuration = dam(llama_models.models, calibration, base=llama_models.base)
        (only,) = sweeps(inventory(tmp_path, configuration), ROOM)
        with watched_reads() as reads:
            merged = merge(configuration, tmp_path / "out")
        stored = sum(tensor.nbytes for tensor in merged.tensors.values())
        assert only.write == stored
        assert only.read == 3 * stored
        assert len(reads.order) == 3 * len(merged.tensors)

    @pytest.mark.parametrize("resident", ["always", "never"])
    def test_sweeps_of_a_search_read_again_what_does_not_stay(
        self, take: Any, resident: str
    ) -> None:
        found = take(metric="sensitivity", resident=resident)
        survey, backward, fit, other, last = sweeps(found, ROOM)
        assert survey.read == last.read == sum(tensor.stored for tensor in found.tensors)
        assert other.condition == "if those are no good"
        if resident == "always":
            assert backward.read == fit.read == 0
        else:
            assert fit.read == survey.read
            embedding = next(t for t in found.tensors if "embed" in t.name)
            assert backward.read == survey.read - embedding.stored


class TestMemory:
    def peak(self, found: Inventory, room: Room = ROOM) -> int:
        made = planned_estimate(found, room)
        return made.own(made.host) - room.baseline

    def wide(self, folder: Path, layers: int = 2, models: int = 2, **parameters: Any) -> Inventory:
        """Of models whose files are small and whose fit is not: headers alone are of that size."""
        config = tiny_llama_config(num_hidden_layers=layers)
        made = save_models(folder, config, count=models)
        text = save_calibration(folder / "text.jsonl")
        return inventory(folder, dam(made.models, [text] * models, **parameters))

    def test_it_is_flat_in_depth(self, tmp_path: Path) -> None:
        shard = replace(ROOM, shard=1)
        two, six = (
            self.peak(self.wide(tmp_path / str(layers), layers), shard) for layers in (2, 6)
        )
        assert two == six

    def test_streams_and_what_is_kept_grow_with_text(self, take: Any) -> None:
        few, more = (self.peak(take(samples=samples)) for samples in (400, 800))
        assert 1.4 * few < more < 2.1 * few

    def test_more_models_take_more(self, tmp_path: Path) -> None:
        peaks = []
        for models in (2, 3, 4):
            found = self.wide(tmp_path / str(models), models=models, metric="sensitivity")
            peaks.append(self.peak(found))
        first, second = peaks[1] - peaks[0], peaks[2] - peaks[1]
        assert first > 0
        assert second > 0

    def test_files_take_the_streams(self, take: Any) -> None:
        host, disk = (take(stream_offload=place, samples=400) for place in ("host", "disk"))
        assert self.peak(disk) < self.peak(host)
        outputs = memory.output_cache_bytes(disk.blocks[0], disk, ROOM)
        streams = memory.stream_bytes(disk)
        assert disk_bytes(host, ROOM) == 4 * streams  # both at two boundaries, for a next run
        assert disk_bytes(disk, ROOM) == (4 + 3) * streams + outputs
        assert disk_bytes(take(stream_offload="host", samples=400, resume=False), ROOM) == 0

    @pytest.mark.parametrize("place", ["host", "disk"])
    def test_outputs_are_kept_up_to_a_share_of_where_they_are(self, take: Any, place: str) -> None:
        found = take(stream_offload=place)
        outputs = memory.output_cache_bytes(found.blocks[0], found, ROOM)
        leaves = 2 * 16 + 16 + 8 + 8 + 16 + 24 + 24 + 16  # norms, q, k, v, o, gate, up, down
        assert outputs == 4 * found.text.tokens * (leaves + 16 + 16)  # o and down stay
        for size, kept in ((4 * outputs, True), (4 * outputs - 4, False)):
            room = replace(ROOM, **{place: size})
            assert bool(memory.output_cache_bytes(found.blocks[0], found, room)) == kept

    def test_on_a_gpu_the_fit_is_there_and_the_shard_is_not(self, take: Any) -> None:
        found = take(stream_offload="host")
        made = planned_estimate(found, replace(ROOM, gpu=24 * GB))
        on_cpu = planned_estimate(found)
        assert made.own(made.host) < on_cpu.own(on_cpu.host)
        assert made.gpu.device > 0
        assert "GPU" in table(made)


class TestProblems:
    def test_memory_that_does_not_suffice_is_reported_with_remedies(self, take: Any) -> None:
        found = take(metric="sensitivity", stream_offload="host")
        assert not any(tensor.converted for tensor in found.tensors)
        small = replace(SPEEDS, memory=1000, available=1000, disk=10)
        memory_, disk = planned_estimate(found, machine=small).problems
        assert memory_.startswith("host memory: ")
        for remedy in (
            "`stream_offload: disk`",
            "`samples`",
            "`metric: identity`",
        ):
            assert remedy in memory_
        assert "resident" not in memory_  # pages of files take no memory of the process's own
        assert disk.startswith("disk: the merged model and temporary files take")

    def test_memory_held_by_other_processes_is_named_as_such(self, take: Any) -> None:
        busy = replace(SPEEDS, available=1000)
        (problem,) = planned_estimate(take(), machine=busy).problems
        assert "free at the moment" in problem

    def test_a_gpu_that_is_too_small(self, take: Any) -> None:
        (problem,) = planned_estimate(take(stream_offload="device"), replace(ROOM, gpu=10)).problems
        assert problem.startswith("GPU memory: ")
        assert "merge on the CPU" in problem

    def test_a_merge_that_fits_has_no_problems(self, take: Any) -> None:
        made = planned_estimate(take())
        assert made.problems == ()
        assert "Everything fits in memory" in table(made)
