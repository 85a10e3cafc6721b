"""What the stock command shows of a merge, on a terminal and elsewhere."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kit.merging import dam
from tests.kit.models import Models
from tests.kit.processes import BIN
from tests.kit.texts import Calibration

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "xterm"}


@pytest.fixture
def command(llama_models: Models, calibration: Calibration, tmp_path: Path) -> Any:
    """Makes a command that merges."""

    def command(*options: str, **parameters: Any) -> list[str]:
        file = tmp_path / "dam.yaml"
        file.write_text(yaml.safe_dump(dam(llama_models.models, calibration, **parameters)))
        return [str(BIN / "mergekit-yaml"), str(file), str(tmp_path / "out"), *options]

    return command


def finished(command: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=True
    )


def test_a_log_has_few_lines_and_no_carriage_returns(command: Any, tmp_path: Path) -> None:
    """A search: survey, backward, fits, a descent; nothing takes a minute."""
    done = finished(command(objective="layer+logits", metric="sensitivity", steps=4))
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr
    assert "torch_dtype" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) <= 20
    assert lines[0].startswith("dam merges ")
    assert lines[1].startswith("text: ")
    assert str(tmp_path / "out") in lines[2]
    assert any(line.startswith("phases: survey; backward; layer fits; ") for line in lines)
    begun = [line.split(" (")[0] for line in lines if " of " in line and ")," in line]
    begun = [name for name in begun if name != "layer fits, plain metric"]  # if those were no good
    assert begun == ["survey", "backward", "layer fits", "descent of 4 steps", "write", "check"]
    assert any(line.startswith("held-out KL from each model") for line in lines)
    assert any("tensors were learned" in line for line in lines)
    assert lines[-2].startswith("evaluate:  mergekit-dam evaluate ")
    assert lines[-1].startswith("reproduce: mergekit-dam reproduce ")


def test_quiet_prints_nothing(command: Any) -> None:
    done = finished(command("--quiet", objective="layer", metric="identity"))
    assert (done.stdout, done.stderr) == ("", "")


def test_verbose_has_a_line_for_each_block_and_trial(command: Any) -> None:
    printed = finished(command("-v", objective="layer", metric="sensitivity")).stderr
    assert "block 1/2: " in printed
    assert "block 2/2: " in printed
    assert "tensors fitted" in printed
    assert "layer, sensitivity: held-out KL " in printed


@contextmanager
def on_terminal(command: list[str]) -> "Iterator[tuple[subprocess.Popen[bytes], int]]":
    import pty  # not on Windows

    own, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        yield process, own
    finally:
        process.kill()
        process.wait()
        os.close(own)


def printed_until(own: int, text: str | None) -> str:
    """What comes from a terminal until a text is there, or until the end."""
    found, deadline = "", time.monotonic() + 300
    while text is None or text not in found:
        assert time.monotonic() < deadline, found
        try:
            found += os.read(own, 65536).decode("utf-8", errors="replace")
        except OSError:  # the end, on Linux
            assert text is None, found
            break
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminals on Windows")
def test_ctrl_c_leaves_a_terminal_as_it_was(command: Any) -> None:
    # A step takes a while: the merge must not be done when the second one comes.
    long = command(objective="logits", steps=100_000, gradient_accumulation=100)
    with on_terminal(long) as (process, own):
        before = printed_until(own, "/100000 loss ")  # drawn twice a second
        assert before.count("\x1b[?25l") == 1  # the cursor is hidden while lines change
        process.send_signal(signal.SIGINT)
        after = printed_until(own, "Ctrl-C")
        process.send_signal(signal.SIGINT)
        after += printed_until(own, None)
        process.wait(timeout=60)
    assert (before + after).rindex("\x1b[?25h") > (before + after).rindex("\x1b[?25l")
    assert "Traceback" not in after
