"""Where a merge works: one process at a time, and nothing is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergekit_dam.errors import DamError
from mergekit_dam.host.workplace import workplace

HOLD = """
import sys, time
from pathlib import Path
from mergekit_dam.host.workplace import workplace
with workplace(Path(sys.argv[1])) as place:
    (place / "hidden").mkdir()
    (place / "hidden" / "states").write_text("large")
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that works on `out`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"
    yield running
    running.kill()
    running.communicate()


def test_is_beside_the_output_private_and_goes(tmp_path: Path) -> None:
    with workplace(tmp_path / "out") as place:
        assert place.parent == tmp_path
        assert place.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []


def test_one_that_somebody_else_has_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States in it would be taken for those of an earlier run."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".dam-out").symlink_to("elsewhere")
    with pytest.raises(DamError, match="got a link or"), workplace(tmp_path / "out"):
        pass
    (tmp_path / ".dam-out").unlink()
    (tmp_path / ".dam-out").mkdir()
    own = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: own + 1)
    with pytest.raises(DamError, match="of another user; delete it"), workplace(tmp_path / "out"):
        pass
    assert list((tmp_path / ".dam-out").iterdir()) == []
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_folders_above_a_failed_merge_go_as_well(tmp_path: Path) -> None:
    with pytest.raises(KeyError), workplace(tmp_path / "a" / "b" / "out"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_keeps_a_second_process_out_and_names_the_first(
    other: subprocess.Popen[str], tmp_path: Path
) -> None:
    with pytest.raises(DamError, match=f"process {other.pid} on "), workplace(tmp_path / "out"):
        pass
    assert (tmp_path / ".dam-out" / "hidden" / "states").exists()


def test_keeps_out_a_second_merge_of_the_same_process(tmp_path: Path) -> None:
    with workplace(tmp_path / "out"):
        refused = pytest.raises(DamError, match=f"process {os.getpid()} on")
        with refused, workplace(tmp_path / "out"):
            pass
        with workplace(tmp_path / "another"):
            pass


def test_is_taken_over_from_a_killed_process_with_all_that_it_left(
    other: subprocess.Popen[str], tmp_path: Path
) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    left = tmp_path / ".dam-out" / "hidden" / "states"
    assert left.exists()
    with workplace(tmp_path / "out"):
        assert not left.exists()
    assert list(tmp_path.iterdir()) == []


def fail(output: Path, *names: str) -> None:
    """Write some files of two megabytes each, and fail."""
    with workplace(output) as place:
        for name in names:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(bytes(2_000_000))
        raise KeyError


def test_what_is_kept_stays_until_the_model_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("kept/state.safetensors", "kept/room/states", "new/out/config.json")
    with pytest.raises(KeyError):
        fail(tmp_path / "out", *names)
    assert {path.name for path in (tmp_path / ".dam-out").iterdir()} == {"kept", "lock"}
    assert f"kept in {tmp_path / '.dam-out'} (4.00 MB); the same command continues" in caplog.text
    with workplace(tmp_path / "out") as place:
        assert (place / "kept" / "room" / "states").exists()
    assert list(tmp_path.iterdir()) == []


def test_what_no_state_names_does_not_stay(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fail(tmp_path / "out", "kept/room/states")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_a_killed_merge_moved_away_comes_back(tmp_path: Path) -> None:
    previous = tmp_path / ".dam-out" / "previous"
    previous.mkdir(parents=True)
    (previous / "config.json").write_text("old")
    with workplace(tmp_path / "out"):
        assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_a_model_that_a_killed_merge_had_replaced_does_not_come_back(tmp_path: Path) -> None:
    for folder, content in ((".dam-out/previous", "old"), ("out", "new")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text(content)
    with workplace(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_after_the_other_works_at_once(tmp_path: Path) -> None:
    """The folder of the lock comes and goes, and two never hold it together."""
    many = """
import sys
from pathlib import Path
from mergekit_dam.errors import DamError
from mergekit_dam.host.workplace import workplace
out = Path(sys.argv[1])
held = 0
while held < 40:
    try:
        with workplace(out):
            out.with_name("inside").mkdir()  # fails if another one is inside
            out.with_name("inside").rmdir()
            held += 1
    except DamError:
        pass
"""
    command = [sys.executable, "-c", many, str(tmp_path / "out")]
    running = [subprocess.Popen(command) for _ in range(3)]
    deadline = time.monotonic() + 120
    assert [process.wait(deadline - time.monotonic()) for process in running] == [0, 0, 0]
