"""Which display a merge has, and what it leaves out."""

import logging

import pytest

from mergekit_dam.display.choose import displayed
from mergekit_dam.display.noise import without_noise
from mergekit_dam.streams import progress
from mergekit_dam.streams.progress import Phase


def tell() -> None:
    progress.plan([Phase("survey", (1.0,))])
    progress.begin("survey")
    progress.show("block 1/1", step=0)
    progress.advance("write", "merge a")
    progress.say("it is done")


def test_quiet_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with displayed(quiet=True):
        tell()
    assert tuple(capfd.readouterr()) == ("", "")


def test_without_a_terminal_there_are_lines_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with displayed(quiet=False):
        tell()
    out, err = capfd.readouterr()
    assert not out
    assert "survey (1 of 1), part" not in err
    assert err.splitlines() == [
        "phases: survey",
        "survey (1 of 1), block 1 of 1",
        "write (2 of 2)",
        "it is done",
    ]


def test_without_a_display_lines_are_in_the_log(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        progress.say("it is done")
    assert caplog.messages == ["it is done"]
    assert "it is done" not in capfd.readouterr().out


def test_a_warning_that_nobody_can_heed_is_left_out_while_a_merge_runs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = logging.getLogger("transformers.configuration_utils")
    with without_noise():
        own.warning("`torch_dtype` is deprecated! Use `dtype` instead!")
        own.warning("another one")
    own.warning("`torch_dtype` is deprecated! Use `dtype` instead!")
    deprecated = "`torch_dtype` is deprecated! Use `dtype` instead!"
    assert list(dict.fromkeys(caplog.messages)) == ["another one", deprecated]
