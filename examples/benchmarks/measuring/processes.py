"""Run a command and measure it: seconds, peak memory, and on Linux bytes read and written.

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
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Measured:
    """How a command went.

    Attributes:
        status: 0, its exit status, or minus the signal that ended it.
        seconds: from its start to its end.
        peak_bytes: most resident memory at a time; files mapped into memory count.
        own_peak_bytes: the same without mapped files, as seen every 20 ms.
        read_bytes: what `read` and its kin returned; pages of mapped files are not among them.
        disk_bytes: what had to come from storage, mapped pages included; less than the files hold
            where some of them were in the page cache.
        written_bytes: what was handed to `write` and its kin.

    The last four are None where the system has no `/proc`.
    """

    status: int
    seconds: float
    peak_bytes: int
    own_peak_bytes: int | None = None
    read_bytes: int | None = None
    disk_bytes: int | None = None
    written_bytes: int | None = None


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
    seen = _watch(Path("/proc", str(process.pid))) if sys.platform == "linux" else {}
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    peak = usage.ru_maxrss * _PEAK_UNIT
    return Measured(os.waitstatus_to_exitcode(status), seconds, peak, **seen)


def _watch(process: Path) -> dict[str, int]:
    """Read a child's directory in /proc until it ends; it still has to be waited for."""
    own_peak = 0
    ended = threading.Event()

    def sample() -> None:
        nonlocal own_peak
        while not ended.wait(_SAMPLE_SECONDS):
            own_peak = max(own_peak, 1024 * _fields(process / "status").get("RssAnon", 0))

    sampler = threading.Thread(target=sample)
    sampler.start()
    # WNOWAIT leaves a zombie, whose counts can be read and whose id no other process gets.
    os.waitid(os.P_PID, int(process.name), os.WEXITED | os.WNOWAIT)
    ended.set()
    sampler.join()
    counts = _fields(process / "io")
    names = {"read_bytes": "rchar", "disk_bytes": "read_bytes", "written_bytes": "wchar"}
    known = {name: counts[field] for name, field in names.items() if field in counts}
    return known | ({"own_peak_bytes": own_peak} if own_peak else {})


def _fields(file: Path) -> dict[str, int]:
    """The numbers of a file in /proc of `name: number` lines; none where it cannot be read."""
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError:  # no such count in this kernel, or not for us
        return {}
    return {words[0][:-1]: int(words[1]) for words in lines if words[1:] and words[1].isdecimal()}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(asdict(_measure(sys.argv[2:]))), encoding="utf-8")
