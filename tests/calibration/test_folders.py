"""Folders as people have them: links, cloned datasets, datasets saved to disk."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from mergekit_dam.errors import CalibrationError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def read(load: Any, source: str) -> tuple[set[str], str]:
    """The files that were read, by their last two names, and what was left out."""
    provenance = load(source, samples=1).provenance
    names = {"/".join(Path(name).parts[-2:]) for name in provenance.files}
    return names, " ".join(provenance.cut)


def shard(folder: Path, name: str, text: str = "the quick brown fox jumps over a lazy dog") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": [text] * 8}), folder / f"{name}.parquet")


def test_linked_folders_are_read_once(tmp_path: Path, load: Any, write: Any) -> None:
    write("disk/main.txt", "the quick brown fox jumps over a lazy dog")
    write("data/own.txt", "the quick brown fox")
    (tmp_path / "data" / "more").symlink_to("../disk")
    (tmp_path / "data" / "same").symlink_to("../disk")
    (tmp_path / "disk" / "loop").symlink_to("../data")
    names, _ = read(load, f"{tmp_path}/data")
    assert names == {"data/own.txt", "more/main.txt"}


def test_a_cloned_dataset_gives_the_training_split_unless_another_is_named(
    tmp_path: Path, load: Any, write: Any
) -> None:
    for split in ("train", "test", "validation"):
        shard(tmp_path / "clone" / "data", f"{split}-00000-of-00001")
    write("clone/README.md", "# a dataset")
    names, cut = read(load, f"{tmp_path}/clone")
    assert names == {"data/train-00000-of-00001.parquet"}
    assert "2 files of other splits (test, validation) were left out: `:split=NAME`" in cut
    names, _ = read(load, f"{tmp_path}/clone:split=test")
    assert names == {"data/test-00000-of-00001.parquet"}
    with pytest.raises(CalibrationError, match=r"no split 'train\[:5%\]'; it has test, train, val"):
        load(f"{tmp_path}/clone:split=train[:5%]")


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["train.txt", "dev.txt"], "", {"train.txt"}),
        (["train.txt", "dev.txt"], ":split=validation", {"dev.txt"}),
        (["a.calibration.txt", "a.test.txt", "v1.5-test.txt"], "", {"a.calibration.txt"}),
        (["a.train.txt", "a.dev.txt", "b.train.txt"], "", {"a.train.txt", "b.train.txt"}),
        (["a.txt", "my-test.txt"], "", {"a.txt"}),
        (["train/0.txt", "eval/0.txt"], "", {"train/0.txt"}),
        (["train/0.txt", "eval/0.txt"], ":split=test", {"eval/0.txt"}),
        (["valid.txt"], "", {"valid.txt"}),
        (["latest.txt", "trains.txt"], "", {"latest.txt", "trains.txt"}),
        (["a.txt", "b.txt", "train.txt"], "", {"a.txt", "b.txt", "train.txt"}),
    ],
)
def test_the_split_of_a_file_is_told_by_words_of_its_name(
    tmp_path: Path, load: Any, write: Any, files: list[str], split: str, expected: set[str]
) -> None:
    for name in files:
        write(f"d/{name}", "the quick brown fox jumps over a lazy dog")
    names, _ = read(load, f"{tmp_path}/d{split}")
    assert {name.removeprefix("d/") for name in names} == expected


def test_splits_of_other_names_have_to_be_named(tmp_path: Path, load: Any) -> None:
    for split in ("train_sft", "train_prefs", "test_sft"):
        shard(tmp_path / "d" / "data", f"{split}-00000-of-00001")
    with pytest.raises(CalibrationError, match="test_sft, train_prefs, train_sft: write `:split"):
        load(f"{tmp_path}/d")
    names, _ = read(load, f"{tmp_path}/d:split=train_sft")
    assert names == {"data/train_sft-00000-of-00001.parquet"}


def test_a_folder_of_save_to_disk_is_read(
    tmp_path: Path, load: Any, texts: list[str], tokenizer: Any
) -> None:
    saved = datasets.Dataset.from_list([{"text": text, "id": 1} for text in texts])
    saved.save_to_disk(tmp_path / "saved", num_shards=2)
    (tmp_path / "saved" / "cache-0123.arrow").write_bytes(b"not the data")
    total = sum(1 + len(tokenizer(text)["input_ids"]) for text in texts)
    provenance = load(f"{tmp_path}/saved", samples=1, sequence_length=total).provenance
    assert (provenance.documents_read, provenance.tokens_available) == (len(texts), total)
    assert len(provenance.files) == 2


def test_a_dataset_with_splits_that_was_saved_gives_the_training_split(
    tmp_path: Path, load: Any, texts: list[str]
) -> None:
    parts = {name: datasets.Dataset.from_dict({"text": texts}) for name in ("train", "other")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    names, cut = read(load, f"{tmp_path}/saved")
    assert names == {"train/data-00000-of-00001.arrow"}
    assert "1 files of other splits (other) were left out" in cut
    names, _ = read(load, f"{tmp_path}/saved:split=other")
    assert names == {"other/data-00000-of-00001.arrow"}
