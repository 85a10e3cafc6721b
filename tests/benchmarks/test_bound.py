"""The benchmark of where time goes, on a merge of tiny models."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from examples.benchmarks.bound import Outcome, Rates, Timer, Work, main, shortened, table
from tests.kit.merging import dam
from tests.kit.models import save_models, tiny_llama_config
from tests.kit.texts import save_calibration


def test_operations_are_counted_by_what_they_do() -> None:
    a = torch.randn(30, 20, dtype=torch.float64)
    with Timer() as timer:
        torch.linalg.cholesky(a.T @ a + torch.eye(20))
        torch.nn.functional.linear(torch.randn(5, 20), torch.randn(7, 20))
    assert timer.kinds["products in float64"].flops == 2 * 20 * 30 * 20
    assert timer.kinds["products in float32"].flops == 2 * 5 * 20 * 7
    assert timer.kinds["Cholesky in float64"].flops == pytest.approx(20**3 / 3)
    assert all(work.seconds > 0 for work in timer.kinds.values())


def test_operations_that_take_little_time_are_shown_as_one() -> None:
    kinds = {f"op {i}": Work(float(i)) for i in range(5)} | {"products": Work(0.5, 7.0)}
    found = shortened(kinds, shown=3)
    assert list(found) == ["products", "op 4", "op 3", "  3 other operations"]
    assert found["  3 other operations"].seconds == 3


def test_the_faster_of_two_measured_rates_counts() -> None:
    before, after = (
        Rates({"products": 3.0, "roots": 5.0}, 7, 2),
        Rates({"products": 4.0, "roots": 1.0}, 6, 8),
    )
    assert before.or_faster(after) == Rates({"products": 4.0, "roots": 5.0}, 7, 8)


@pytest.mark.parametrize(("rate", "known"), [(2.0, True), (0.5, False)])
def test_rates_slower_than_the_merge_are_no_bound(rate: float, known: bool) -> None:
    rates = Rates({"products": rate, "roots": 1.0}, 1.0, 1.0)
    found = table(Outcome({"products": Work(10.0, 10.0)}, 20.0, 0.0, rates))
    assert f"{20 / (10 / rate):.2f} times the bound" in found
    assert ("no bound" not in found) is known


@pytest.mark.slow
def test_a_merge_is_measured_against_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = save_models(tmp_path, tiny_llama_config(), count=2)
    text = str(save_calibration(tmp_path / "text.jsonl"))
    config = dam(models.models, [text, text], objective="layer", metric="identity")
    (tmp_path / "dam.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["dam.yaml", "--threads", "1", "--", "--quiet"])
    assert result.exception is None, result.output
    assert "products in float32" in result.output
    (times,) = re.findall(r"^([\d.]+) times the bound", result.output, re.MULTILINE)
    assert float(times) > 1
    assert not list(tmp_path.glob("bound-*"))
