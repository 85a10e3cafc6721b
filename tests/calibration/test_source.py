"""Parsing what stands behind `calibration:`."""

import os
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from mergekit_dam.calibration.source import CalibrationSource
from mergekit_dam.errors import CalibrationError

parse = CalibrationSource.parse


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "code").mkdir(parents=True)
    for name in ("math.jsonl", "notes.txt", "table.xlsx", "bare", "chat.jinja"):
        (tmp_path / "data" / name).write_text("x", encoding="utf-8")


def test_a_file_a_directory_and_a_dataset_are_distinguished() -> None:
    assert parse("data/math.jsonl").kind == "file"
    assert parse("data/code/").kind == "directory"
    assert parse("org/german-corpus").kind == "hub"
    assert parse("imdb").kind == "hub"


def test_options_are_read_behind_a_dataset() -> None:
    source = parse("org/german-corpus:split=train[:10%]:column=body:name=de:samples=64")
    assert (source.location, source.split, source.column) == (
        "org/german-corpus",
        "train[:10%]",
        "body",
    )
    assert (source.name, source.samples, source.revision) == ("de", 64, None)


def test_a_revision_follows_the_dataset_id() -> None:
    source = parse("org/german-corpus@v1.2:split=test")
    assert (source.location, source.revision, source.split) == ("org/german-corpus", "v1.2", "test")


def test_options_are_read_behind_a_file_and_text_is_kept() -> None:
    source = parse(" data/math.jsonl:samples=3:chat_template=data/chat.jinja ")
    assert (source.location, source.samples) == ("data/math.jsonl", 3)
    assert source.chat_template == "data/chat.jinja"
    assert source.text == "data/math.jsonl:samples=3:chat_template=data/chat.jinja"


def test_colons_in_paths_open_no_option(tmp_path: Path) -> None:
    folder = tmp_path / "run: a:lr=0.1"
    folder.mkdir()
    (folder / "b:c.txt").write_text("x", encoding="utf-8")
    assert parse(f"{folder}/b:c.txt").location == f"{folder}/b:c.txt"
    source = parse(f"{folder}/b:c.txt:samples=2")
    assert (source.location, source.samples) == (f"{folder}/b:c.txt", 2)


def test_a_drive_letter_is_part_of_the_path() -> None:
    with pytest.raises(CalibrationError, match=r"no file or directory at .*C:\\data\\math\.jsonl"):
        parse("C:\\data\\math.jsonl:samples=2")


def test_a_source_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        parse("data/math.jsonl").samples = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no path and no dataset id is given"),
        ("data/missing.jsonl", r"no file or directory at /.*/data/missing\.jsonl"),
        ("../elsewhere/", r"no file or directory at .*not the id of a Hub dataset"),
        ("a/b/c", "no file or directory"),
        ("~nobody of this name/math.jsonl", r"no file or directory at .*~nobody of this name"),
        ("https://example.org/x", "no file or directory"),
        ("x" * 5000 + "/y z", "no file or directory"),
        ("data/table.xlsx", r"'\.xlsx' files are not read; convert to one of \.txt, \.jsonl"),
        ("data/bare", "a file without a suffix is not read"),
        ("data/math.jsonl:colum=text", "unknown option 'colum'; did you mean `column`?"),
        ("data/math.jsonl:zzz=1", "unknown option 'zzz'; known are split, name, column"),
        ("data/math.jsonl:split=train", "`split` is for Hub datasets and folders, but"),
        ("data/math.jsonl:format=alpacca", "`format` must be one of .*; did you mean `alpaca`"),
        ("data/math.jsonl:format=alpaca:column=a", "`format=alpaca` reads several: give one"),
        ("data/notes.txt:format=text", r"`format` is for rows, but a \.txt file has none"),
        ("data/table.jsonl.gz", "no file or directory"),
        ("data/math.jsonl:share=2", "`share` must be a number between 0 and 1; got '2'"),
        ("data/math.jsonl:share=0.5:samples=2", "`samples` and `share` both say how many"),
        ("data/code:name=de", "`name` is for Hub datasets, but 'data/code' is a local path"),
        ("data/notes.txt:column=a", r"`column` is for rows, but a \.txt file has none"),
        ("data/math.jsonl:samples=0", r"`samples` must be a whole number above 0, .*; got '0'"),
        ("data/math.jsonl:samples=1.5", r"`samples` must be a whole number .*; got '1.5'"),
        (f"data/math.jsonl:samples={10**40}", r"whole number above 0, below 10\^9"),
        ("data/math.jsonl:column=", "option `column` has no value"),
        ("data/math.jsonl:column=a:column=b", "option `column` is given twice"),
        ("data/math.jsonl:chat_template=no.jinja", "existing jinja file; none at 'no.jinja'"),
    ],
)
def test_a_bad_source_is_refused_with_its_reason(text: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        parse(text)


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(CalibrationError) as caught:
        parse("data/math.jsonl:split=a:samples=x:colum=b")
    for part in ("`split` is for Hub", "`samples` must be", "unknown option 'colum'"):
        assert part in str(caught.value)


def test_a_pipe_and_a_device_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "text.jsonl")
    for location in (str(tmp_path / "text.jsonl"), "/dev/zero"):
        with pytest.raises(CalibrationError, match="a pipe or a device cannot be read twice"):
            CalibrationSource.parse(location)


def test_self_is_the_models_own_text(tmp_path: Path) -> None:
    source = parse("self:samples=8:start=chat")
    assert (source.kind, source.samples, source.start) == ("self", 8, "chat")
    (tmp_path / "self").mkdir()
    assert parse("self").kind == "self"
    assert parse("./self").kind == "directory"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("self:start=poem", "`start` must be one of text, chat; got 'poem'"),
        ("self:column=body", "`column` is for text that is read"),
        ("data/math.jsonl:start=text", "`start` is for `self`"),
    ],
)
def test_options_that_do_not_suit_self_are_refused(text: str, message: str) -> None:
    with pytest.raises(CalibrationError) as error:
        parse(text)
    assert message in str(error.value)
