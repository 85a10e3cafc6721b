"""A finished model takes the place of an older one: whole, and what is the user's own stays."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mergekit_dam.errors import DamError
from mergekit_dam.host.publish import check_replaceable, publish

OLD = {
    "config.json": "old",
    "model-00001-of-00002.safetensors": "old",
    "model-00002-of-00002.safetensors": "old",
    "model.safetensors.index.json": "old",
    "tokenizer.model": "old",
    "mergekit_config.yml": "old",
    "dam_corrections.safetensors": "old",
}
NEW = {
    "config.json": "new",
    "model.safetensors": "new",
    "mergekit_config.yml": "new",
    "dam_report.json": "new",
}
OWN = {"notes.txt": "mine", "gguf/model.gguf": "mine", "modeling_own.py": "mine"}

Place = Callable[[Path], None]


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def read(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def finished(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A finished model, where it is to go, and the workplace."""
    place = tmp_path / ".dam-out"
    return write(place / "new" / "out", NEW), tmp_path / "out", place


def refuse_to_move(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make a folder one that the system does not rename, as it does with mount points."""
    stock = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path == folder:
            raise OSError(16, "Device or resource busy")
        return stock(path, target)

    monkeypatch.setattr(Path, "rename", rename)


def test_a_new_folder_appears_without_temporary_ones(tmp_path: Path) -> None:
    write(tmp_path / ".dam-out" / "new" / "out", {".dam-1/states": "large"})
    publish(*finished(tmp_path))
    assert not (tmp_path / "out" / ".dam-1").exists()
    assert read(tmp_path / "out") == NEW


@pytest.mark.parametrize("moved", [True, False], ids=["moved", "filled"])
def test_an_older_merge_is_replaced_and_files_of_the_user_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    write(tmp_path / "out", {**OLD, **OWN})
    before = (tmp_path / "out").stat().st_ino
    if not moved:
        refuse_to_move(monkeypatch, tmp_path / "out")
    publish(*finished(tmp_path))
    assert read(tmp_path / "out") == {**NEW, **OWN}
    assert ((tmp_path / "out").stat().st_ino == before) is not moved


def test_symbolic_links_of_the_user_stay_links(tmp_path: Path) -> None:
    write(tmp_path / "out", OLD)
    (tmp_path / "out" / "latest").symlink_to("elsewhere")
    publish(*finished(tmp_path))
    assert (tmp_path / "out" / "latest").readlink() == Path("elsewhere")


def test_the_mode_of_the_folder_stays(tmp_path: Path) -> None:
    write(tmp_path / "out", OLD).chmod(0o750)
    publish(*finished(tmp_path))
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_the_working_directory_stays_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write(tmp_path / "out", OLD))
    publish(*finished(tmp_path))
    assert Path("config.json").read_text() == "new"


def test_a_file_system_without_hard_links_keeps_the_files_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(Path, "hardlink_to", link)
    write(tmp_path / "out", {**OLD, **OWN})
    publish(*finished(tmp_path))
    assert read(tmp_path / "out") == {**NEW, **OWN}


class Stopped(BaseException):
    """Ends a process in the middle."""


@pytest.mark.parametrize("moved", [True, False], ids=["moved", "filled"])
def test_no_reader_ever_sees_parts_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    """At every call that changes a name, whoever opens the configuration finds one model."""
    out = write(tmp_path / "out", {**OLD, **OWN})
    if not moved:
        refuse_to_move(monkeypatch, out)
    seen = []

    def look() -> None:
        found = read(out) if out.exists() else {}
        entry = found.get("config.json")
        weights = {n: c for n, c in found.items() if n.startswith("model")}
        if entry is not None:
            source = {"old": OLD, "new": NEW}[entry]
            assert weights == {n: c for n, c in source.items() if n.startswith("model")} | (
                {"modeling_own.py": "mine"}
            )
        seen.append(entry)

    for owner, name in ((Path, "rename"), (Path, "unlink"), (os, "rename"), (os, "link")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name), look))
    publish(*finished(tmp_path))
    look()
    assert seen[0] == "old"
    assert seen[-1] == "new"


def watched(stock: Callable[..., object], look: Callable[[], None]) -> Callable[..., object]:
    def call(*args: object, **kwargs: object) -> object:
        look()
        return stock(*args, **kwargs)

    return call


def test_a_move_that_is_stopped_leaves_the_older_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write(tmp_path / "out", {**OLD, **OWN})

    def link(*_: object, **__: object) -> None:
        raise Stopped

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(Path, "hardlink_to", link)
    with pytest.raises(Stopped):
        publish(*finished(tmp_path))
    assert read(out) == {**OLD, **OWN}


class TestCheckReplaceable:
    @pytest.mark.parametrize(
        "files",
        [{}, OLD, {"dam_report.json": "{}", "model.safetensors": ""}, {".git/HEAD": "", "log": ""}],
        ids=["empty", "merge", "merge without a card", "files that no merge writes"],
    )
    def test_accepts(self, tmp_path: Path, files: dict[str, str]) -> None:
        (tmp_path / "out").mkdir()
        check_replaceable(write(tmp_path / "out", files))

    def test_accepts_what_does_not_exist(self, tmp_path: Path) -> None:
        check_replaceable(tmp_path / "new" / "out")

    @pytest.mark.parametrize("name", ["model.safetensors", "README.md", "tokenizer.json"])
    def test_refuses_files_that_are_no_merge(self, tmp_path: Path, name: str) -> None:
        write(tmp_path, {name: "mine", "notes.txt": ""})
        with pytest.raises(DamError, match=f"holds {name} and no mergekit_config.yml; move"):
            check_replaceable(tmp_path)

    @pytest.mark.parametrize("out", ["file", "file/out", "file/a/out"])
    def test_refuses_a_file_in_the_way(self, tmp_path: Path, out: str) -> None:
        write(tmp_path, {"file": "mine"})
        with pytest.raises(DamError, match=r"required a folder, but .*file is a file"):
            check_replaceable(tmp_path / out)
