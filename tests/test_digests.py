"""sha256 of files."""

import hashlib
import os
from pathlib import Path

import pytest

from mergekit_dam.digests import hashed_ahead, sha256_from, sha256_of

CONTENT = os.urandom(9 * 2**20)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(CONTENT)
    return path


def test_a_digest_is_that_of_the_content(file: Path) -> None:
    assert sha256_of(file) == hashlib.sha256(CONTENT).hexdigest()
    assert sha256_from(file, 5) == hashlib.sha256(CONTENT[5:]).hexdigest()


def test_a_file_that_was_written_again_is_read_again(file: Path) -> None:
    before = sha256_of(file)
    file.write_bytes(b"other")
    assert sha256_of(file) == hashlib.sha256(b"other").hexdigest() != before


def test_files_hashed_ahead_are_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hashlib.sha256(CONTENT).hexdigest()
    with hashed_ahead([file]):
        assert sha256_of(file) == expected
        monkeypatch.setattr(hashlib, "sha256", None)  # nothing is read any more
        assert sha256_of(file) == expected
    assert sha256_of(file) == expected


def test_digests_that_nobody_waited_for_are_made_when_they_are_asked_for(file: Path) -> None:
    with pytest.raises(KeyboardInterrupt), hashed_ahead([file]):
        raise KeyboardInterrupt
    assert sha256_of(file) == hashlib.sha256(CONTENT).hexdigest()


def test_large_files_of_the_hubs_cache_are_known_by_their_names(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()
    blob = tmp_path / "blobs" / digest
    blob.parent.mkdir()
    blob.write_bytes(b"never read")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert sha256_of(link) == digest


def test_small_files_of_the_hubs_cache_are_read(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / hashlib.sha1(b"x").hexdigest()
    blob.parent.mkdir()
    blob.write_bytes(b"x")
    assert sha256_of(blob) == hashlib.sha256(b"x").hexdigest()
