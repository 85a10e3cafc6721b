"""Every local format gives the same tokens; every bad file says where and why."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mergekit_dam.calibration import files
from mergekit_dam.errors import CalibrationError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROW = {"text": "the quick brown fox jumps over a lazy dog while numbers add up to sums"}


def parquet(path: Path, columns: dict[str, list[Any]]) -> str:
    pq.write_table(pa.table(columns), path)
    return path.as_posix()


def test_all_formats_of_the_same_rows_give_the_same_tokens(
    texts: list[str], tmp_path: Path, write: Any, load: Any
) -> None:
    rows = [{"text": text, "id": i} for i, text in enumerate(texts)]
    sources = [
        write("a.jsonl", rows),
        write("a.json", json.dumps(rows)),
        write("b.json", json.dumps({"version": 1, "data": rows})),
        write("c.json", json.dumps(texts)),
        write("b.jsonl", texts),
        write("bom.jsonl", "\ufeff" + "\r\n\n".join(map(json.dumps, rows))),
        parquet(tmp_path / "a.parquet", {"id": [1] * len(texts), "text": texts}),
        write("c.jsonl:x.jsonl", [{"body": text, "text": "not this"} for text in texts])
        + ":column=body",
        parquet(tmp_path / "b.parquet", {"body": texts}) + ":column=body",
    ]
    hashes = {load(source).provenance.sha256 for source in sources}
    assert len(hashes) == 1


def test_a_text_file_is_one_document(write: Any, load: Any, tokenizer: Any) -> None:
    text = "the quick\n\nbrown fox\njumps over a lazy dog"
    calibration = load(write("a.txt", text), samples=1)
    expected = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    assert calibration.tokens[0].tolist() == expected[:8]
    assert calibration.provenance.documents_read == 1


def test_a_directory_is_read_recursively_and_others_are_counted(
    texts: list[str], write: Any, load: Any, tmp_path: Path
) -> None:
    write("d/b/one.jsonl", [{"text": text} for text in texts[:5]])
    write("d/two.TXT", texts[5])
    write("d/README.md", "ignored")
    write("d/.hidden/three.txt", "ignored")
    write("d/empty.txt", " \n")
    provenance = load(f"{tmp_path}/d", samples=1).provenance
    names = {Path(name).name for name in provenance.files}
    assert names == {"one.jsonl", "two.TXT", "empty.txt"}
    assert (provenance.documents_read, provenance.empty_skipped) == (6, 1)
    assert "2 hidden files or files of another type were ignored" in provenance.cut


def test_a_single_object_is_one_row(write: Any, load: Any) -> None:
    assert load(write("a.json", json.dumps(ROW))).provenance.documents_read == 1


def test_empty_documents_are_counted_and_skipped(write: Any, load: Any) -> None:
    rows = [{"text": ""}, {"text": " \n"}, {"text": None}, {"input_ids": []}, ROW]
    provenance = load(write("a.jsonl", rows), samples=1).provenance
    assert (provenance.documents_read, provenance.empty_skipped) == (1, 4)


def test_the_first_standard_column_that_is_not_null_counts(tmp_path: Path, load: Any) -> None:
    ids = [[5, 6, 7, 8] * 4, None]
    source = parquet(tmp_path / "a.parquet", {"text": [None, ROW["text"]], "input_ids": ids})
    assert load(source).provenance.documents_read == 2


def test_token_ids_are_taken_as_they_are(write: Any, load: Any) -> None:
    source = write("a.jsonl", [{"input_ids": list(range(10, 26))}])
    assert load(source).tokens.tolist() == [[*range(10, 18)], [*range(18, 26)]]


def test_a_text_file_larger_than_a_block_is_read_on(
    write: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "TEXT_BLOCK", 30)
    provenance = load(write("a.txt", ROW["text"])).provenance
    assert provenance.documents_read == -(-len(ROW["text"]) // 30)
    assert len(provenance.files) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl line 2 is not JSON: Expecting value"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"line 2: a row must be an object .* got list"),
        ("a.jsonl", '{"n": ' + "1" * 5000 + "}", "line 1 cannot be parsed as JSON"),
        ("a.jsonl", b'{"text": "\xff"}', r"line 1 is not UTF-8 text \(invalid start byte\)"),
        ("a.txt", b"abc \xe4", r"a\.txt is not UTF-8 text .* convert it to UTF-8"),
        ("a.json", '[{"text": "a"},\n nope]', r"a\.json is not JSON: .* at column 2 of line 2"),
        ("a.json", '{"a": [], "b": []}', "this object has 2 lists under the keys 'a', 'b'"),
        ("a.json", "3", "must be a list of rows or an object with a single list; got int"),
        ("a.json", "[" * 200_000, "cannot be parsed as JSON|is not JSON"),
        ("a.jsonl", '{"txt": "a", "id": 1}', "none of the columns 'text', .* are 'txt', 'id': w"),
        ("a.jsonl", '{"text": 3}', "line 1: 'text' must be a string, a list .* got int"),
        ("a.jsonl", '{"text": ["a"]}', "token ids; got a list of str"),
        ("a.jsonl", '{"input_ids": [1, true]}', "got a list of bool and int"),
        ("a.jsonl", '{"text": "half \\ud800"}', "line 1 holds half of a surrogate pair"),
        ("a.jsonl", "\n", "holds no text"),
        ("a.json", "[]", "holds no text"),
        ("a.txt", "", r"holds no text \(1 empty documents\)"),
        ("a.parquet", b"PAR1 no", "is no readable parquet file"),
    ],
)
def test_a_bad_file_is_named_with_its_place_and_reason(
    write: Any, load: Any, name: str, content: str | bytes, message: str
) -> None:
    source = write(name, content)
    with pytest.raises(CalibrationError, match=message) as caught:
        load(source)
    assert str(caught.value).startswith("calibration of org/math: ")


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_wrong_column_lists_those_that_exist(
    tmp_path: Path, write: Any, load: Any, kind: str
) -> None:
    row = {"text": "a", "solution": "b"}
    source = {
        "jsonl": lambda: write("a.jsonl", [row]),
        "json": lambda: write("a.json", json.dumps([row])),
        "parquet": lambda: parquet(tmp_path / "a.parquet", {k: [v] for k, v in row.items()}),
    }[kind]()
    with pytest.raises(
        CalibrationError,
        match="1 has no column 'solutoin'; its columns are "
        r"'text', 'solution': did you mean `column=solution`\?",
    ):
        load(f"{source}:column=solutoin")


def test_a_bare_string_has_no_column(write: Any, load: Any) -> None:
    with pytest.raises(CalibrationError, match="line 1 is a bare string, which has no column 'a'"):
        load(write("a.jsonl", ["text"]) + ":column=a")


def test_a_directory_without_readable_files_is_refused(
    tmp_path: Path, write: Any, load: Any
) -> None:
    write("d/a.md", "x")
    with pytest.raises(CalibrationError, match=r"holds no \.txt.* file \(1 others were ignored\)"):
        load(f"{tmp_path}/d")


def test_a_file_that_may_not_be_read_is_named(
    write: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write("a.txt", "x")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CalibrationError, match=r"a\.txt cannot be read: Permission denied"):
        load(source)


def test_a_missing_library_is_named_with_the_extra(
    tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = parquet(tmp_path / "a.parquet", {"text": ["a"]})

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # makes its import fail
    with pytest.raises(CalibrationError, match=r"pip install 'mergekit-dam\[data\]'"):
        load(source)


def test_an_id_outside_the_vocabulary_is_named_with_its_token_if_it_has_one(
    write: Any, load: Any
) -> None:
    source = write("a.jsonl", [{"input_ids": [3, 400, 5, 6] * 4}])
    with pytest.raises(CalibrationError, match=r"line 1: token id 400 is outside .* of 350 ids"):
        load(source, vocab_size=350)
    with pytest.raises(CalibrationError, match=r"token '.+' \(id 6\) is outside .* of 6 ids"):
        load(write("b.jsonl", [{"input_ids": [3, 4, 5, 6] * 4}]), vocab_size=6)
