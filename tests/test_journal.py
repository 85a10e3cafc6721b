"""The journal gives back what was put, whole, or nothing."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mergekit_dam import journal as journal_module
from mergekit_dam.journal import Journal
from mergekit_dam.streams.storage import Storage

TENSORS = {
    "fp64": torch.tensor([[1 / 3, math.pi]], dtype=torch.float64),
    "bf16": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "ids": torch.arange(5),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "number": torch.tensor(3.0),
    "none": torch.zeros(0, 4),
    "learned": torch.ones(2, requires_grad=True),
}


class Clock:
    """A clock that is told what time it is."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_gives_back_plain_values_and_tensors(tmp_path: Path) -> None:
    plain = {"a": [1, 0.1, True, None, "text"], "b": {"c": []}, "d": float("inf")}
    Journal(tmp_path).put("key", {"plain": plain, "tensors": TENSORS})
    found = Journal(tmp_path).get("key")
    assert found["plain"] == plain
    assert found["tensors"].keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found["tensors"][name].dtype == tensor.dtype
        assert found["tensors"][name].equal(tensor.detach())


@pytest.mark.parametrize("piece", [1, 100, 1 << 26])
def test_hidden_states_in_files_are_written_in_pieces(
    tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_PIECE", piece)
    states = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    on_disk = Storage("disk", folder=tmp_path).keep(iter([states[:2], states[2:]]), 5)
    Journal(tmp_path).put("key", [on_disk, states])
    for found in Journal(tmp_path).get("key"):
        assert found.equal(states)


def test_files_are_found_again_where_the_folder_was_moved_to(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a")
    with journal.room("room") as room:
        own, other = room / "own", tmp_path / "other"
        own.touch()
        other.touch()
        journal.put("key", {"own": own, "other": other})
        (tmp_path / "a").rename(tmp_path / "b")
        found = Journal(tmp_path / "b").get("key")
        assert found == {"own": tmp_path / "b" / ".dam-room" / "own", "other": other}


def test_a_state_whose_files_are_gone_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "own").touch()
    Journal(tmp_path).put("key", tmp_path / "own")
    (tmp_path / "own").unlink()
    assert Journal(tmp_path).get("key") is None
    assert "is made again" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "emptied", "another file"])
def test_a_damaged_state_is_none(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Journal(tmp_path).put("key", TENSORS)
    file = tmp_path / "key.safetensors"
    content = file.read_bytes()
    file.write_bytes({"cut": content[:-1], "emptied": b"", "another file": b"{}"}[damage])
    assert Journal(tmp_path).get("key") is None
    assert "is made again" in caplog.text


def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.put("key", 1)

    class Broken:
        dtype, shape = torch.float32, torch.Size((2,))

        def __getitem__(self, index: slice) -> torch.Tensor:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        journal.put("key", [Broken()])
    assert journal.get("key") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["key.safetensors"]


def test_without_keeping_nothing_is_written_and_nothing_found(tmp_path: Path) -> None:
    Journal(tmp_path).put("key", 1)
    journal = Journal(tmp_path, keeps=False)
    assert journal.get("key") is None
    journal.put("other", 2)
    assert not journal.due()
    assert [file.name for file in tmp_path.iterdir()] == ["key.safetensors"]


def test_states_take_a_small_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    journal = Journal(tmp_path, clock=clock)

    class Slow:
        dtype, shape = torch.float32, torch.Size((1,))

        def __getitem__(self, index: slice) -> torch.Tensor:
            clock.now += 2.0
            return torch.zeros(1)

    assert journal.due()
    journal.put("key", [Slow()])
    writing = 2.0
    for _ in range(1000):
        clock.now += 1.0
        if journal.due():
            journal.put("key", [Slow()])
            writing += 2.0
    assert 0.01 < writing / clock.now <= 0.03


def test_the_newest_state_says_how_far_the_merge_is(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.said == ""
    for key, said in (("b", "one"), ("a", "two"), ("c", "")):
        journal.put(key, None, said=said)
        os.utime(tmp_path / f"{key}.safetensors", ns=(0, 1000 + len(said) + ord(key)))
    assert journal.said == "one"


def test_what_a_state_may_name_goes_when_another_one_is_there(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    old = tmp_path / "old"
    old.mkdir()
    journal.remove(old)
    assert old.exists()
    journal.put("key", None)
    assert not old.exists()


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("lasting", [True, False])
def test_rooms_go_when_they_are_done_and_last_for_the_next_run(
    tmp_path: Path, keeps: bool, lasting: bool
) -> None:
    journal = Journal(tmp_path, keeps=keeps)

    def work(error: type[BaseException] | None) -> set[Any]:
        with journal.room("room", lasting=lasting) as room:
            before = {file.name for file in room.iterdir()}
            (room / "states").touch()
            if error is not None:
                raise error
        return before

    with pytest.raises(KeyboardInterrupt):
        work(KeyboardInterrupt)
    lasts = keeps and lasting
    assert any(tmp_path.iterdir()) == lasts
    assert work(None) == ({"states"} if lasts else set())
    assert not any(tmp_path.iterdir())


def test_values_of_a_state_are_readable_by_other_programs(tmp_path: Path) -> None:
    Journal(tmp_path).put("key", {"x": TENSORS["ids"]})
    with safe_open(tmp_path / "key.safetensors", framework="pt") as opened:
        assert opened.get_tensor("0").equal(TENSORS["ids"])
