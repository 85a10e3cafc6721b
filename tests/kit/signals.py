"""A command that runs beside the tests, and gets real signals."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def _listen() -> None:
    """Tests that nohup runs ignore this signal, and so would the command."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Running:
    """A command under way.

    Args:
        command: the command with its arguments.
        log: file for all that it prints.
    """

    def __init__(self, command: Sequence[str | Path], log: Path) -> None:
        self._log = log
        with log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                list(map(str, command)),
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
                preexec_fn=_listen,
            )

    @property
    def printed(self) -> str:
        return self._log.read_text("utf-8", errors="replace")

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until the command is so far."""
        deadline = time.monotonic() + 300
        while not ready():
            assert self._process.poll() is None, self.printed
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.02)

    def wait_for(self, text: str) -> None:
        """Wait until the command has printed something."""
        self.wait(lambda: text in self.printed)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def finish(self) -> int:
        """Wait for the end; the status."""
        try:
            return self._process.wait(timeout=180)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
