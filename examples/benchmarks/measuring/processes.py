"""Run a command and measure it: seconds, and peak resident memory.

    python processes.py RESULT.json COMMAND...

On Linux a new process inherits its parent's peak as its own, so a merge started by a benchmark that
has just evaluated a model would be charged for that model. This file is therefore also the small
program that stands between the two. It needs the standard library alone, and a POSIX system.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere


@dataclass(frozen=True)
class Measured:
    """How a command went.

    Attributes:
        status: 0, its exit status, or minus the signal that ended it.
        seconds: from its start to its end.
        peak_bytes: most resident memory at a time; files mapped into memory count.
    """

    status: int
    seconds: float
    peak_bytes: int


Runner = Callable[[Sequence[str], Path], Measured]
"""(command, log file) -> how it went."""


def run_measured(command: Sequence[str], log: Path) -> Measured:
    """Run a command to its end; whatever it prints goes to `log`.

    An exception here, such as Ctrl-C, ends the command and all that it started.
    """
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as output:
        result = Path(folder, "result.json")
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(result), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, to be ended as a whole
        )
        try:
            status = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        if status:  # the program in between was killed: nothing was measured
            return Measured(status, 0.0, 0)
        return Measured(**json.loads(result.read_text(encoding="utf-8")))


def failure(measured: Measured, log: Path) -> str:
    """Why a command failed, from the end of what it printed; empty if it did not."""
    if not measured.status:
        return ""
    if measured.status < 0:
        return f"ended by signal {-measured.status} ({signal.strsignal(-measured.status)})"
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    starts = [index for index, line in enumerate(lines) if line.startswith("Error:")]
    said = lines[starts[-1] :] if starts else lines[-1:]  # or the end of a traceback
    return " ".join(said) or f"exit status {measured.status}"


def _measure(command: Sequence[str]) -> Measured:
    began = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    return Measured(os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss * _PEAK_UNIT)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(asdict(_measure(sys.argv[2:]))), encoding="utf-8")
