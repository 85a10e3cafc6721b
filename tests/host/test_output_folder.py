"""The output folder: what is there stays as it is until a merge is whole."""

import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mergekit.common import ModelReference

from mergekit_dam.errors import DamError
from mergekit_dam.host.output import output_folder
from mergekit_dam.interrupts import terminable


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An older merge."""
    (tmp_path / "out").mkdir()
    for name in ("config.json", "mergekit_config.yml"):
        (tmp_path / "out" / name).write_text("old")
    return tmp_path / "out"


@pytest.fixture
def stock_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP as they are for a program that never asked for them."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_finished_merge_takes_its_place(out: Path) -> None:
    with output_folder(out, []) as folder:
        assert folder.name == "out"
        (folder / "config.json").write_text("new")
        assert (out / "config.json").read_text() == "old"
    assert (out / "config.json").read_text() == "new"
    assert names(out) == {"config.json"}
    assert names(out.parent) == {"out"}


def test_a_link_to_a_folder_stays_a_link(out: Path) -> None:
    link = out.with_name("link")
    link.symlink_to("out")
    with output_folder(link, []) as folder:
        (folder / "config.json").write_text("new")
    assert link.is_symlink()
    assert (out / "config.json").read_text() == "new"


def test_a_failed_merge_leaves_the_older_one_and_what_others_wrote_meanwhile(out: Path) -> None:
    def fail() -> None:
        with output_folder(out, []) as folder:
            (folder / "config.json").write_text("new")
            (out / "mine.txt").write_text("mine")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (out / "config.json").read_text() == "old"
    assert names(out) == {"config.json", "mergekit_config.yml", "mine.txt"}
    assert names(out.parent) == {"out"}


@pytest.mark.usefixtures("stock_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_merge_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    def write_until_terminated() -> None:
        with output_folder(tmp_path / "out", []) as folder:
            (folder / ".dam-1").mkdir(parents=True)
            (folder / "model-1.safetensors").touch()
            os.kill(os.getpid(), number)
            time.sleep(5)

    with pytest.raises(SystemExit) as ended:
        write_until_terminated()
    assert ended.value.code == 128 + number
    assert names(tmp_path) == set()
    assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.usefixtures("stock_signals")
def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # by nohup
    with output_folder(tmp_path / "out", []) as folder:
        os.kill(os.getpid(), signal.SIGHUP)
        (folder / "config.json").write_text("new")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("fixed", ["mount point", "parent that cannot be written"])
def test_a_folder_that_cannot_be_moved_is_worked_in(
    out: Path, monkeypatch: pytest.MonkeyPatch, fixed: str
) -> None:
    if fixed == "mount point":
        monkeypatch.setattr(os.path, "ismount", lambda path: path == out)
    else:
        monkeypatch.setattr(os, "access", lambda path, _: path != out.parent)
    (out / "mine.txt").write_text("mine")
    before = out.stat().st_ino
    with output_folder(out, []) as folder:
        assert folder.is_relative_to(out)
        (folder / "config.json").write_text("new")
        assert names(out.parent) == {"out"}
    assert (out / "config.json").read_text() == "new"
    assert names(out) == {"config.json", "mine.txt"}
    assert out.stat().st_ino == before


@pytest.mark.parametrize(
    ("model", "output"),
    [("a", "a"), ("a", "."), ("a", "a/out"), ("link", "a"), ("a", "link/out")],
    ids=["itself", "around it", "in it", "by a link", "in it by a link"],
)
def test_a_source_is_refused(tmp_path: Path, model: str, output: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    source = ModelReference.model_validate({"model": {"path": str(tmp_path / model)}})
    refused = pytest.raises(DamError, match=f"but {tmp_path / model} is")
    with refused, output_folder(tmp_path / output, [source]):
        pytest.fail("it is not refused")
    assert names(tmp_path) == {"a", "link"}
    assert names(tmp_path / "a") == set()


def test_a_neighbour_whose_name_begins_alike_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    source = ModelReference.model_validate({"model": {"path": str(tmp_path / "a")}})
    with output_folder(tmp_path / "a-merged", [source]) as folder:
        (folder / "config.json").touch()
    assert names(tmp_path) == {"a", "a-merged"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("24576 requested and 15360 written"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
    ],
    ids=["system", "numpy", "safetensors", "torch"],
)
def test_a_full_disk_is_said_and_leaves_the_older_merge(out: Path, error: Exception) -> None:
    with pytest.raises(DamError, match="no room is left on the disk"), output_folder(out, []):
        raise error
    assert (out / "config.json").read_text() == "old"
    assert names(out.parent) == {"out"}


def test_ctrl_c_while_the_output_is_put_in_place_comes_too_late() -> None:
    before = signal.getsignal(signal.SIGINT)
    with terminable() as uninterrupted:
        uninterrupted()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
