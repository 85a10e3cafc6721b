"""The benchmark of merges: recovery, and the report."""

import json

import pytest

from examples.benchmarks.merge_quality import results
from examples.benchmarks.merge_quality.results import LINEAR, OWN, Report, Row, Trial, best
from tests.kit.benchmarks import cells_of


class TestRecovery:
    def test_is_the_share_of_the_advantage_won_back(self):
        linear, own = {"a": 3.0, "b": 2.0}, {"a": 2.0, "b": 1.5}
        found = results.recovery({"a": 2.25, "b": 2.1}, linear=linear, own=own)
        assert found == pytest.approx({"a": 0.75, "b": -0.2})
        assert results.mean(found) == pytest.approx(0.275)
        assert results.mean(results.recovery(linear, linear=linear, own=own)) == 0
        assert results.mean(results.recovery(own, linear=linear, own=own)) == 1

    def test_leaves_out_a_domain_without_an_advantage(self):
        found = results.recovery(
            {"a": 2.5, "b": 1.0}, linear={"a": 3.0, "b": 2.0}, own={"a": 2.0, "b": 2.0}
        )
        assert found == {"a": 0.5, "b": None}
        assert results.mean(found) == 0.5
        assert results.mean({"a": None}) is None

    def test_the_best_point_is_that_of_most_recovery(self):
        """Not of least mean loss, which the domain of the widest losses would decide."""
        linear, own = {"a": 10.0, "b": 1.0}, {"a": 5.0, "b": 0.9}
        near_a = Trial(parameters={}, validation={"a": 9.0, "b": 1.0})
        near_b = Trial(parameters={}, validation={"a": 10.0, "b": 0.91})
        broken = Trial(parameters={}, reason="broken")
        assert best([broken, near_a, near_b], linear=linear, own=own) is near_b
        assert best([near_a, near_b], linear={}, own=own) is near_a
        assert best([broken], linear=linear, own=own) is None


def report():
    chosen = Trial(
        parameters={"weight": 0.4, "normalize": False},
        seconds=12.345,
        peak_bytes=1_234_567_890,
        validation={"a": 2.5, "b": 1.75},
    )
    return Report(
        domains=("a", "b"),
        rows=(
            Row(name=OWN, test={"a": 2.0, "b": 1.5}, validation={"a": 2.0, "b": 1.5}),
            Row(name=LINEAR, test={"a": 3.0, "b": 2.0}, validation={"a": 3.0, "b": 2.0}),
            Row(
                name="ties",
                test={"a": 2.2504, "b": 2.1},
                validation=chosen.validation,
                trials=(chosen, Trial(parameters={}, reason="no")),
                chosen=chosen,
            ),
            Row(name="broken", reason="one | two\nthree"),
        ),
        texts=("a: 3 documents",),
        settings={"dtype": "float32"},
    )


class TestReport:
    def test_the_table_holds_the_numbers(self):
        rows = cells_of(report().table())
        assert rows["ties"] == {
            "nats per token": "ties",
            "a": "2.250",
            "b": "2.100",
            "recovery": "0.275",
            "by domain": "0.75 -0.20",
            "validation": "0.500",
            "seconds": "12.3",
            "GB": "1.23",
            "of": "2",
            "parameters, or why it failed": "weight=0.4, normalize=false",
        }
        assert rows[LINEAR]["recovery"] == "0.000"
        assert rows["broken"]["parameters, or why it failed"] == "one / two three"
        assert rows["broken"]["recovery"] == rows["broken"]["a"] == ""

    def test_its_numbers_are_those_of_the_json(self):
        found = json.loads(json.dumps(report().to_json()))
        table = cells_of(report().table())
        assert [row["name"] for row in found["rows"]] == list(table)
        for row in found["rows"]:
            cells = table[row["name"]]
            for domain, loss in row["test"].items():
                assert float(cells[domain]) == pytest.approx(loss, abs=5e-4)
            if row["recovery"] is not None:
                assert float(cells["recovery"]) == pytest.approx(row["recovery"], abs=5e-4)
            if row["chosen"] is not None:
                assert float(cells["seconds"]) == pytest.approx(row["chosen"]["seconds"], abs=0.05)

    def test_the_page_defines_what_it_shows(self):
        page = report().markdown()
        assert report().table() in page
        assert "(CE_linear - CE_merged) / (CE_linear - CE_own_specialist)" in page
        assert "a: 3 documents" in page
