"""The benchmark of costs: its rows, ratios and tables."""

import json

import pytest

from examples.benchmarks.measuring.processes import Measured
from examples.benchmarks.merge_cost import plot
from examples.benchmarks.merge_cost.methods import REPLAY, Choices, select
from examples.benchmarks.merge_cost.results import LINEAR, Comparison, Report, Row
from mergekit_dam.errors import DamError
from tests.kit.benchmarks import cells_of


class TestRows:
    def test_linear_comes_first_and_always(self, tmp_path):
        def names(**choices):
            return [row.name for row in select(Choices(**choices), coefficients=tmp_path / "c")]

        every = [LINEAR, REPLAY, "layer_identity", "layer_sensitivity", "dam"]
        assert names() == every
        assert names(only=("layer*",), skip=("*sens*", LINEAR)) == [LINEAR, "layer_identity"]
        assert names(variants={"mine": {"ridge": 1}}) == [*every, "mine"]
        with pytest.raises(DamError, match="a row named dam is there already"):
            names(variants={"dam": {}})

    def test_rows_that_fit_are_distinguished_from_others(self, tmp_path):
        merges = select(Choices(), coefficients=tmp_path / "file")
        assert [merge.name for merge in merges if not merge.point.fits] == [LINEAR, REPLAY]
        assert merges[1].point.parameters == {"coefficients": str(tmp_path / "file")}
        assert merges[1].shown == {"coefficients": "file"}


def row(name, seconds, peaks, own=None, **given):
    rounds = [
        Measured(0, second, peak, own_peak_bytes=own)
        for second, peak in zip(seconds, peaks, strict=True)
    ]
    return Row(name=name, parameters={}, rounds=tuple(rounds), **given)


class TestResults:
    def test_ratios_are_those_of_a_round(self):
        """The machine was three times slower in the second round: that is nobody's ratio."""
        linear = row(LINEAR, [1.0, 3.0, 1.0], [100] * 3)
        fit = row("fit", [2.0, 6.0], [150, 250])
        assert fit.ratio("seconds", linear) == 2.0
        assert fit.of("seconds") == 4.0
        assert fit.ratio("peak_bytes", linear) == 2.0
        assert linear.ratio("seconds", linear) == 1.0

    def test_unknown_values_are_left_out(self):
        linear = row(LINEAR, [1.0], [100])
        failed = Row(name="fit", parameters={"ridge": 1.0}, reason="no luck")
        assert failed.of("seconds") is failed.ratio("seconds", linear) is None
        assert linear.of("own_peak_bytes") is None
        assert linear.ratio("seconds", failed) is None
        cells = cells_of(Comparison(case={}, rows=(linear, failed)).table())
        assert cells[LINEAR]["seconds"] == "1.0"
        assert cells[LINEAR]["own GB"] == ""
        assert cells["fit"]["seconds"] == cells["fit"]["rounds"] == ""
        assert cells["fit"]["parameters, or why it failed"] == "no luck"

    def test_the_table_holds_the_numbers(self):
        measured = Measured(
            0, 12.345, 1_234_567_890, own_peak_bytes=10**9, read_bytes=5_000_000, disk_bytes=0
        )
        fit = Row(name="fit", parameters={"ridge": 0.1}, rounds=(measured,))
        linear = row(LINEAR, [10.0, 10.0], [10**9] * 2)
        assert cells_of(Comparison(case={}, rows=(linear, fit)).table())["fit"] == {
            "merge": "fit",
            "seconds": "12.3",
            "time ratio": "1.23",
            "GB": "1.23",
            "memory ratio": "1.23",
            "own GB": "1.00",
            "read GB": "0.005",
            "disk GB": "0.000",
            "written GB": "",
            "rounds": "1",
            "parameters, or why it failed": "ridge=0.1",
        }

    def test_a_page_holds_every_table_and_json_every_round(self):
        found = swept()
        page = found.markdown(["layers.png"])
        for comparison in found.comparisons:
            assert comparison.table() in page
        assert found.tables() in page
        assert "![layers.png](layers.png)" in page
        data = json.loads(json.dumps(found.to_json()))
        assert [own["case"] for own in data["comparisons"]] == [
            {"layers": 2},
            {"layers": 4},
            {"samples": 8},
        ]
        fit = data["comparisons"][0]["rows"][1]
        assert [own["seconds"] for own in fit["rounds"]] == [2.0]
        assert (fit["time_ratio"], fit["peak_bytes"]) == (2.0, 200_000_000)

    def test_a_sweep_gives_memory_by_value(self):
        layers, samples = swept().curves()
        assert (layers.name, layers.values) == ("layers", (2, 4))
        assert layers.peaks == {
            "Peak GB": {LINEAR: (1e8, 1e8), "fit": (2e8, None)},
            "Own GB": {LINEAR: (5e7, 5e7), "fit": (6e7, None)},
        }
        assert samples.values == (8,)
        table = next(iter(layers.tables())).partition("\n\n")[2]
        assert cells_of(table) == {
            "2": {"layers": "2", LINEAR: "0.100", "fit": "0.200"},
            "4": {"layers": "4", LINEAR: "0.100", "fit": ""},
        }

    def test_a_sweep_is_drawn(self, tmp_path):
        pytest.importorskip("matplotlib")
        assert plot.available()
        plot.draw(next(iter(swept().curves())), tmp_path / "layers.png")
        assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def swept():
    linear = row(LINEAR, [1.0, 1.0], [10**8] * 2, own=5 * 10**7)
    fit = row("fit", [2.0], [2 * 10**8], own=6 * 10**7)
    failed = Row(name="fit", parameters={}, reason="no luck")
    return Report(
        comparisons=(
            Comparison(case={"layers": 2}, rows=(linear, fit)),
            Comparison(case={"layers": 4}, rows=(linear, failed)),
            Comparison(case={"samples": 8}, rows=(linear, fit)),
        ),
        settings={"dtype": "float32"},
    )
