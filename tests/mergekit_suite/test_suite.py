"""How the outcomes of mergekit's own tests are compared."""

from pathlib import Path

from tests.mergekit_suite.suite import differences, outcomes, summary


def test_outcomes_of_a_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.a" name="good"/>
        <testcase classname="tests.a" name="bad"><failure/></testcase>
        <testcase classname="tests.a" name="broken[x]"><error/></testcase>
        <testcase classname="tests.b" name="later"><skipped/></testcase>
        </testsuite></testsuites>"""
    )
    found = outcomes(report)
    assert found == {
        "tests.a::good": "passed",
        "tests.a::bad": "failed",
        "tests.a::broken[x]": "failed",
        "tests.b::later": "skipped",
    }
    assert summary(found) == "1 passed, 1 skipped, 2 failed"


def test_every_other_outcome_is_a_difference() -> None:
    without = {"a": "passed", "b": "failed", "c": "skipped", "d": "passed"}
    assert differences(without, without) == []
    found = differences(without, {"a": "failed", "b": "passed", "c": "skipped"})
    assert found == [
        "a: passed without it, failed with it",
        "b: failed without it, passed with it",
        "d: passed without it, not run with it",
    ]


def test_a_test_of_our_method_alone_has_to_pass() -> None:
    without = {"a": "failed"}
    assert differences(without, {**without, "a[dam]": "passed"}) == []
    assert differences(without, {**without, "a[dam]": "failed"}) == [
        "a[dam]: failed, and not run without it"
    ]
