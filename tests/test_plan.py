"""What a merge will cost: counted on tiny merges, and nothing but headers read for it."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from torch.utils.flop_counter import FlopCounterMode

from mergekit_dam.cli import main
from mergekit_dam.estimate import flops, memory
from mergekit_dam.estimate.estimate import Estimate, estimate, sweep_seconds
from mergekit_dam.estimate.inventory import Inventory, take_inventory
from mergekit_dam.estimate.machine import Machine, calibrate
from mergekit_dam.estimate.memory import Room
from mergekit_dam.estimate.merge import PlannedMerge, plan_merge
from mergekit_dam.estimate.report import table
from mergekit_dam.estimate.sweeps import sweeps
from mergekit_dam.model.part import block_part, output_part
from mergekit_dam.search.search import DESCENTS
from tests.merging import dam, merge, watched_reads
from tests.models import ARCHITECTURES, Models, save_calibration, save_models, tiny_llama_config

GB = 10**9
SPEEDS = Machine(
    forward=1e9,
    fp32=1e9,
    fp64=5e8,
    cholesky=2e8,
    elements=1e8,
    read=1e8,
    write=5e7,
    memory=64 * GB,
    available=64 * GB,
    disk=100 * GB,
)
ROOM = Room(
    host=64 * GB,
    gpu=0,
    disk=100 * GB,
    baseline=300_000_000,
    libraries=100_000_000,
    shard=5 * GB,
)


def planned(folder: Path, configuration: Mapping[str, Any]) -> PlannedMerge:
    file = folder / "dam.yaml"
    file.write_text(yaml.safe_dump(dict(configuration)), encoding="utf-8")
    LoaderCache.loaders.clear()
    return plan_merge(file, MergeOptions(quiet=True), folder / "out")


def inventory(folder: Path, configuration: Mapping[str, Any]) -> Inventory:
    return take_inventory(planned(folder, configuration))


@pytest.fixture
def take(tmp_path: Path, llama_models: Models, calibration: tuple[Path, Path]) -> Any:
    """The inventory of the session's models with some parameters of the merge."""

    def take(**parameters: Any) -> Inventory:
        configuration = dam(llama_models.models, calibration, base=llama_models.base, **parameters)
        return inventory(tmp_path, configuration)

    return take


def planned_estimate(found: Inventory, room: Room = ROOM, machine: Machine = SPEEDS) -> Estimate:
    return estimate(found, machine, room, startup=5.0)


class TestInventory:
    def test_nothing_but_headers_is_read(self, take: Any) -> None:
        with mock.patch.object(LazyTensorLoader, "get_tensor", side_effect=AssertionError):
            found = take()
        assert len(found.blocks) == 2
        assert found.sources == 3

    def test_tensors_and_bytes_are_those_of_the_files(
        self, take: Any, llama_models: Models
    ) -> None:
        found = take()
        folders = [*llama_models.models, llama_models.base]
        files = [folder / "model.safetensors" for folder in folders]
        # Of a file, all but the header.
        sizes = [f.stat().st_size - int.from_bytes(f.read_bytes()[:8], "little") - 8 for f in files]
        assert sum(tensor.stored for tensor in found.tensors) == sum(sizes)
        assert sorted(sum(own) for own in found.files) == sorted(f.stat().st_size for f in files)

    def test_text_is_counted_and_not_read(self, tmp_path: Path, llama_models: Models) -> None:
        text = tmp_path / "empty.jsonl"
        text.touch()
        found = inventory(
            tmp_path, dam(llama_models.models, [text, f"{text}:samples=9"], samples=4)
        )
        assert found.text.sequences == (4, 9)
        assert found.text.held_out == (1, 1)
        assert found.text.tokens == 13 * 16
        assert found.text.first_tokens(2 * 16) == 4 * 16

    def test_another_dtype_makes_copies(
        self, tmp_path: Path, llama_models: Models, take: Any
    ) -> None:
        assert not any(tensor.converted for tensor in take().tensors)
        text = save_calibration(tmp_path)
        settings = {"dtype": "bfloat16", "out_dtype": "float32"}
        found = inventory(tmp_path, dam(llama_models.models, [text] * 2, settings=settings))
        for tensor in found.tensors:
            assert tensor.converted == tensor.loaded == 2 * 2 * tensor.parameters
            assert (tensor.stored, tensor.written) == (8 * tensor.parameters, 4 * tensor.parameters)

    def test_an_adapter_is_taken_for_its_base(self, tmp_path: Path, llama_models: Models) -> None:
        """Merging it would read weights."""
        text = save_calibration(tmp_path)
        adapted = Path(f"{llama_models.base}+{tmp_path / 'adapter'}")
        models = [adapted, llama_models.models[0]]
        found = inventory(tmp_path, dam(models, [text, text], base=llama_models.base))
        assert found.sources == 3
        assert not any(model.lora for model in LoaderCache.loaders)

    @pytest.mark.parametrize(
        "name", ["llama", "gpt2", "gemma2", "llama-tied", "stablelm", "phi", "olmo2"]
    )
    def test_parts_are_taken_apart_as_the_fit_does(self, tmp_path: Path, name: str) -> None:
        models = save_models(tmp_path, ARCHITECTURES[name](), count=2)
        text = save_calibration(tmp_path / "text.jsonl")
        plan = planned(tmp_path, dam(models.models, [text, text], base=models.base))
        found = take_inventory(plan)
        for size, stage in zip(found.parts, plan.stages, strict=True):
            decoder = stage.models.output
            part = stage.part(decoder)
            weights = {
                plan.name[len(part.prefix) :]: torch.randn(
                    decoder.model.get_parameter(plan.name).shape
                )
                for plan in stage.all_tensors
                if plan.tied_to is None
            }
            like = torch.zeros((1, 2), dtype=torch.long)
            anatomy = part.anatomy(
                weights, like if stage.kind == "input" else torch.zeros(1, 2, 16)
            )
            expected = [[(unit.name, unit.kind) for unit in own] for own in anatomy.groups]
            got = [
                [(unit.name, "linear" if unit.kind == "head" else unit.kind) for unit in own]
                for own in size.groups
            ]
            assert got == expected, stage.label

    def test_a_replay_has_no_parts(
        self, tmp_path: Path, llama_models: Models, calibration: tuple[Path, Path]
    ) -> None:
        merge(dam(llama_models.models, calibration), tmp_path / "first")
        found = inventory(tmp_path, dam(llama_models.models, coefficients=str(tmp_path / "first")))
        assert (found.parts, found.settings) == ((), None)
        (only,) = sweeps(found, ROOM)
        assert only.read == sum(tensor.stored for tensor in found.tensors)
        assert table(planned_estimate(found)).startswith("without a fit: 2 sources")

    def test_slices_that_leave_out_models(
        self, tmp_path: Path, llama_models: Models, calibration: tuple[Path, Path]
    ) -> None:
        """A teacher is read where it is not merged; a stack of copies is merged without a fit."""
        first, second = (
            {"model": str(model), "layer_range": [0, 1], "parameters": {"calibration": str(text)}}
            for model, text in zip(llama_models.models, calibration, strict=True)
        )
        configuration = dam([], settings={"models": None})
        configuration["slices"] = [{"sources": [first]}, {"sources": [first, second]}]
        found = inventory(tmp_path, configuration)
        assert (found.sources, len(found.blocks)) == (2, 2)
        assert planned_estimate(found).sweeps[0].read == sum(t.stored for t in found.tensors)
        configuration["slices"] = [{"sources": [first]}, {"sources": [second]}]
        found = inventory(tmp_path, configuration)
        assert (found.sources, found.parts, found.settings) == (2, (), None)
        assert table(planned_estimate(found)).startswith("without a fit: 2 sources")


class TestWork:
    @pytest.mark.parametrize("kind", ["block", "output"])
    def test_flops_of_a_forward_pass_are_those_that_torch_counts(
        self, tmp_path: Path, kind: str
    ) -> None:
        config = tiny_llama_config(attn_implementation="eager")
        models = save_models(tmp_path, config, count=2)
        text = save_calibration(tmp_path / "text.jsonl")
        plan = planned(tmp_path, dam(models.models, [text, text], base=models.base))
        found = take_inventory(plan)
        decoder = plan.stages[0].models.output
        decoder.model.set_attn_implementation("eager")  # type: ignore[operator]
        decoder.calls.cache_clear()
        part = block_part(decoder, 0) if kind == "block" else output_part(decoder)
        stage = plan.stages[1 if kind == "block" else -1]
        weights = {
            own.name[len(part.prefix) :]: torch.zeros(decoder.model.get_parameter(own.name).shape)
            for own in stage.tensors
        }
        with FlopCounterMode(display=False) as counted:
            part.run(weights, torch.zeros(2, found.text.length, found.hidden))
        size = found.parts[1 if kind == "block" else -1]
        expected, _ = flops.forward(size, found, 2 * found.text.length)
        # Torch counts the product of positions and frequencies, too.
        assert counted.get_total_flops() == pytest.approx(expected, rel=0.02)

    def test_a_dense_solve_is_counted_by_hand(self, take: Any) -> None:
        found = take()
        (unit,) = (u for u in found.blocks[0].units if u.name.endswith("down_proj"))
        work = flops.linear_fit(unit, 2, found, sensitivity=False)
        out, columns = 16, 24
        assert work["solves", "cholesky"] == (2 * columns) ** 3 // 3
        # Loss and residual at the start, two iterations; three pairs of directions.
        assert work["solves", "fp64"] == (2 + 2) * 2 * out * columns**2
        assert work["solves", "fp32"] == 3 * 2 * out * columns**2
        assert work["Gram matrices", "fp32"] == 2 * found.text.fit_tokens * out * columns

    def test_linears_of_one_input_share_a_gram_matrix(self, take: Any) -> None:
        found = take(head=False)
        work = flops.layer_fit(found.blocks[0], found, kept=True, sensitivity=False)
        linears = found.blocks[0].of("linear")
        crosses = sum(unit.enters * unit.leaves for unit in linears)
        grams = sum(width**2 for width in (16, 16, 16, 24))
        assert work["Gram matrices", "fp32"] == 2 * found.text.fit_tokens * (crosses + grams)

    @pytest.mark.parametrize("head", [True, False])
    def test_a_head_that_is_not_fitted_takes_no_time(self, take: Any, head: bool) -> None:
        work = flops.layer_sweep(take(head=head), kept=True, sensitivity=False)
        assert (work["head", "fp32"] > 0) == head

    def test_what_is_not_kept_runs_again(self, take: Any) -> None:
        found = take()
        kept, again = (
            flops.layer_fit(found.blocks[0], found, kept=kept, sensitivity=False)
            for kept in (True, False)
        )
        for kind in ("teachers", "merged stream"):
            assert again[kind, "forward"] > kept[kind, "forward"]

    def test_a_descent_takes_time_by_its_steps(self, take: Any) -> None:
        found = take(objective="layer+logits")
        every = [sweep for sweep in sweeps(found, ROOM) if sweep.name.startswith("descent")]
        assert [sweep.name for sweep in every] == [f"descent, {n} steps" for n in DESCENTS]
        assert [sweep.certain for sweep in every] == [True, *[False] * (len(DESCENTS) - 1)]
        first, *_, last = [sweep_seconds(sweep, SPEEDS) for sweep in every]
        assert last == pytest.approx(DESCENTS[-1] / DESCENTS[0] * first, rel=0.3)


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
        assert 1.5 * few < more < 2.1 * few

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
        outputs = sum(memory.output_cache_bytes(disk.blocks[0], disk, ROOM))
        assert memory.disk_bytes(host, ROOM) == 0
        assert memory.disk_bytes(disk, ROOM) == 3 * memory.stream_bytes(disk) + outputs

    @pytest.mark.parametrize("place", ["host", "disk"])
    def test_outputs_are_kept_up_to_a_share_of_where_they_are(self, take: Any, place: str) -> None:
        found = take(stream_offload=place)
        teachers, merged = memory.output_cache_bytes(found.blocks[0], found, ROOM)
        leaves = 2 * 16 + 16 + 8 + 8 + 16 + 24 + 24 + 16  # norms, q, k, v, o, gate, up, down
        assert teachers == 4 * found.text.tokens * leaves
        assert merged == 4 * found.text.tokens * (16 + 8 + 8 + 16 + 24 + 24)
        for size, kept in ((8 * teachers, True), (8 * teachers - 4, False)):
            room = replace(ROOM, **{place: size})
            assert (memory.output_cache_bytes(found.blocks[0], found, room) != (0, 0)) == kept

    def test_on_a_gpu_the_fit_is_there_and_the_shard_is_not(self, take: Any) -> None:
        found = take(stream_offload="host")
        made = planned_estimate(found, replace(ROOM, gpu=24 * GB))
        on_cpu = planned_estimate(found)
        assert made.own(made.host) < on_cpu.own(on_cpu.host)
        assert made.gpu.device > 0
        assert "GPU" in table(made)


class TestProblems:
    def test_what_does_not_fit_is_told_with_what_to_turn(self, take: Any) -> None:
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
        assert disk.startswith("disk: the merged model and hidden states take")

    def test_memory_that_others_hold_is_told_apart(self, take: Any) -> None:
        busy = replace(SPEEDS, available=1000)
        (problem,) = planned_estimate(take(), machine=busy).problems
        assert "free at the moment" in problem

    def test_a_gpu_that_is_too_small(self, take: Any) -> None:
        (problem,) = planned_estimate(take(stream_offload="device"), replace(ROOM, gpu=10)).problems
        assert problem.startswith("GPU memory: ")
        assert "leave out --cuda" in problem

    def test_what_fits_is_no_problem(self, take: Any) -> None:
        made = planned_estimate(take())
        assert made.problems == ()
        assert "Everything fits." in table(made)


def test_the_machine_is_measured(tmp_path: Path) -> None:
    clock = iter(range(10**6))
    made = calibrate(16, 24, tmp_path / "out", torch.device("cpu"), clock=lambda: 0.2 * next(clock))
    assert list(tmp_path.iterdir()) == []
    for name in ("forward", "fp32", "fp64", "cholesky", "elements", "read", "write"):
        assert 0 < getattr(made, name) < float("inf")
    assert made.available <= made.memory


class TestCommand:
    def run(self, file: Path, *arguments: str) -> Any:
        LoaderCache.loaders.clear()
        quick = mock.patch("mergekit_dam.estimate.estimate.calibrate", return_value=SPEEDS)
        with quick, mock.patch.object(LazyTensorLoader, "get_tensor", side_effect=AssertionError):
            return CliRunner().invoke(main, ["plan", str(file), *arguments])

    @pytest.fixture
    def file(self, tmp_path: Path, llama_models: Models, calibration: tuple[Path, Path]) -> Path:
        file = tmp_path / "dam.yaml"
        configuration = dam(llama_models.models, calibration, objective="layer+logits", steps=3)
        file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
        return file

    def test_it_prints_tables(self, file: Path, tmp_path: Path) -> None:
        result = self.run(file, str(tmp_path / "out"))
        assert result.exit_code == 0, result.output
        for shown in ("2 sources of 2 blocks", "survey", "descent, 3 steps", "peak", "in all"):
            assert shown in result.output
        assert not (tmp_path / "out").exists()

    def test_it_prints_json(self, file: Path) -> None:
        result = self.run(file, "--json")
        told = json.loads(result.stdout)
        assert told["blocks"] == 2
        assert [sweep["name"] for sweep in told["sweeps"]] == [
            "survey",
            "layer fits, identity",
            "descent, 3 steps",
            "merge and write",
        ]
        least = told["startup_seconds"] + sum(sweep["seconds"] for sweep in told["sweeps"])
        assert told["seconds"]["least"] == pytest.approx(least)
        assert told["peak_host_bytes"] == max(p["host_bytes"] for p in told["memory"])

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("a: [", "mergekit cannot read it"),
            (
                "merge_method: linear\nmodels:\n- model: a/b\n",
                "required `merge_method: dam`, got `linear`",
            ),
            ("merge_method: dam\nmodels:\n- model: a/b\n- model: a/c\n", "required `calibration`"),
        ],
    )
    def test_a_configuration_that_a_merge_would_refuse(
        self, tmp_path: Path, text: str, said: str
    ) -> None:
        file = tmp_path / "dam.yaml"
        file.write_text(text, encoding="utf-8")
        result = self.run(file)
        assert result.exit_code == 1
        assert "in the dam configuration:\n" in result.output
        assert said in result.output

    def test_models_that_differ_are_refused(self, file: Path, tmp_path: Path) -> None:
        configuration = yaml.safe_load(file.read_text("utf-8"))
        other = save_models(tmp_path, tiny_llama_config(num_hidden_layers=3), count=1)
        configuration["models"][1]["model"] = str(other.models[0])
        file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
        assert self.run(file).exit_code == 1

    def test_a_model_that_is_not_there(self, file: Path, tmp_path: Path) -> None:
        configuration = yaml.safe_load(file.read_text("utf-8"))
        configuration["models"][1]["model"] = str(tmp_path / "nothing")
        file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
        result = self.run(file)
        assert result.exit_code == 1
        assert f"Error: {tmp_path / 'nothing'}: required a folder with a model" in result.output

    def test_sequences_that_are_too_long(self, file: Path) -> None:
        configuration = yaml.safe_load(file.read_text("utf-8"))
        configuration["parameters"]["sequence_length"] = 10_000
        file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
        assert "`sequence_length` is 10000, but the model has" in self.run(file).output

    def test_a_gpu_that_is_not_there(self, file: Path) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is one")
        result = self.run(file, "--cuda")
        assert result.exit_code == 1
        assert "torch finds no GPU" in result.output

    def test_a_size_that_is_none(self, file: Path) -> None:
        assert "required a number such as 5B" in self.run(file, "--out-shard-size", "much").output
