"""Sources of one model that hold the same text."""

from typing import Any

import pytest

from mergekit_dam.calibration.overlap import in_both

SENTENCES = [f"The {i}th sentence says something that no other one says." for i in range(400)]


def rows(first: int, last: int) -> list[dict[str, str]]:
    return [{"text": " ".join(SENTENCES[i : i + 4])} for i in range(first, last, 4)]


@pytest.mark.parametrize(("first", "warns"), [(0, True), (200, False)])
def test_text_that_stands_in_two_sources_is_told(
    first: int, warns: bool, write: Any, load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy of a sequence that is held out would be fitted to."""
    one, other = write("one.jsonl", rows(0, 200)), write("other.jsonl", rows(first, first + 200))
    load((one, other), samples=40, sequence_length=64)
    said = [record.message for record in caplog.records if "are in both" in record.message]
    assert bool(said) == warns
    if warns:
        assert repr(other) in said[0]


def test_the_share_is_of_the_text_that_keeps_fewer() -> None:
    assert in_both("0000000100000002", "000000020000000300000004") == 0.5
    assert in_both("", "00000001") == 0.0
