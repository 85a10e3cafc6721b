"""Estimated operations, against counted ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mergekit_dam.estimate import flops
from mergekit_dam.estimate.estimate import sweep_seconds
from mergekit_dam.estimate.inventory import take_inventory
from mergekit_dam.estimate.sweeps import sweeps
from mergekit_dam.model.part import block_part, output_part
from mergekit_dam.search.descents import DESCENTS
from tests.kit.estimates import ROOM, SPEEDS, planned
from tests.kit.merging import dam
from tests.kit.models import save_models, tiny_llama_config
from tests.kit.texts import save_calibration


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
        block = found.blocks[0]
        (unit,) = (u for u in block.units if u.name.endswith("down_proj"))
        work = flops.linear_fit(unit, block, found, sensitivity=False)
        out, columns = 16, 24
        assert work["solves", "cholesky"] == (2 * columns) ** 3 // 3
        # The residual at the start, two iterations; three pairs of directions.
        assert work["solves", "fp64"] == (1 + 2) * 2 * out * columns**2
        assert work["solves", "fp32"] == 3 * 2 * out * columns**2
        assert work["Gram matrices", "fp32"] == 2 * found.text.fit_tokens * out * (columns + 1)

    def test_linears_of_one_input_share_a_gram_matrix(self, take: Any) -> None:
        found = take(head=False)
        work = flops.layer_fit(found.blocks[0], found, kept=True, sensitivity=False)
        linears = found.blocks[0].of("linear")
        crosses = sum((unit.enters + 1) * unit.leaves for unit in linears)  # and sums of targets
        grams = sum(width * (width + 1) for width in (16, 16, 16, 24))  # and sums of inputs
        assert work["Gram matrices", "fp32"] == 2 * found.text.fit_tokens * (crosses + grams)

    @pytest.mark.parametrize("head", [True, False])
    def test_a_head_that_is_not_fitted_takes_no_time(self, take: Any, head: bool) -> None:
        work = flops.layer_sweep(take(head=head), kept=True, sensitivity=False)
        assert (work["head", "fp32"] > 0) == head

    def test_outputs_that_are_not_kept_are_computed_again(self, take: Any) -> None:
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
        assert [sweep.condition for sweep in every] == ["if 5% of the KL are left", "if that pays"]
        first, *_, last = [sweep_seconds(sweep, SPEEDS) for sweep in every]
        assert last == pytest.approx(DESCENTS[-1] / DESCENTS[0] * first, rel=0.3)

    @pytest.mark.parametrize("parameters", [{"objective": "logits"}, {"steps": 20}])
    def test_a_descent_that_is_asked_for_is_certain(
        self, take: Any, parameters: dict[str, Any]
    ) -> None:
        found = take(**{"objective": "layer+logits", **parameters})
        names = [sweep.name for sweep in sweeps(found, ROOM) if sweep.certain]
        assert "descent, 20 steps" in names
