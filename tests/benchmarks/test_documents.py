"""The benchmark of merges: how documents are split into parts."""

import json

import pytest

from examples.benchmarks.merge_quality import documents
from examples.benchmarks.merge_quality.documents import PARTS, Shares, Sources
from mergekit_dam.errors import DamError

LONG = "a text of more than forty characters, so that it counts wherever it stands"


def save_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


class TestSplit:
    def test_parts_are_disjoint_and_hold_everything(self):
        texts = [f"document {i}" for i in range(100)]
        parts = documents.split(texts, Shares().of(PARTS))
        assert [len(part) for part in parts] == [50, 20, 30]
        assert sorted(text for part in parts for text in part) == sorted(texts)

    def test_follows_from_the_texts_and_not_from_their_order(self):
        texts = [f"document {i}" for i in range(20)]
        assert documents.split(texts, [0.5, 0.5]) == documents.split(texts[::-1], [0.5, 0.5])

    @pytest.mark.parametrize("shares", [(0.98, 0.01, 0.01), (0.01, 0.01, 0.98)])
    def test_gives_every_part_a_document(self, shares):
        assert [len(part) for part in documents.split(["a", "b", "c"], shares)] == [1, 1, 1]

    def test_refuses_fewer_documents_than_parts(self):
        with pytest.raises(DamError, match="2 documents cannot be split into 3 parts"):
            documents.split(["a", "b"], [0.4, 0.3, 0.3])

    def test_shares_are_relative_to_the_parts_that_a_file_serves_for(self):
        shares = Shares(calibration=0.5, validation=0.2, test=0.3)
        assert shares.of(("calibration", "validation")) == pytest.approx([5 / 7, 2 / 7])
        assert shares.of(("test",)) == [1.0]


class TestOverlap:
    def test_finds_what_is_equal_but_for_white_space(self):
        assert documents.overlap(["a  b\nc"], ["a b c", "a b"]) == ["a b c"]

    def test_finds_a_text_inside_another_either_way(self):
        assert documents.overlap([LONG], [f"before {LONG} after", "x"]) == [f"before {LONG} after"]
        assert documents.overlap([f"before {LONG} after"], [LONG, "x"]) == [LONG]

    def test_takes_no_short_text_for_a_part_of_another(self):
        assert documents.overlap(["Yes"], [f"Yes, {LONG}"]) == []
        assert documents.overlap([f"Yes, {LONG}"], ["Yes"]) == []

    def test_finds_nothing_across_two_documents(self):
        assert documents.overlap(["one " * 8, "two " * 8], ["one " * 8 + "two " * 8]) == []


class TestParts:
    def test_test_text_is_never_calibration_text(self, tmp_path):
        """Files of their own that share documents, within a domain and across."""
        mixed = [f"{LONG} {i}." for i in range(40)]
        sources = {
            "a": Sources(
                calibration=save_texts(tmp_path / "a.jsonl", mixed[:30]),
                test=save_texts(tmp_path / "at.jsonl", mixed[25:35]),
            ),
            "b": Sources(
                calibration=save_texts(tmp_path / "b.jsonl", [*mixed[30:33], *mixed[36:]]),
                validation=save_texts(tmp_path / "bv.jsonl", ["v", mixed[36]]),
                test=save_texts(tmp_path / "bt.jsonl", ["w", mixed[0]]),
            ),
        }
        parts, left_out = documents.make_parts(sources, Shares())
        held = {part: {text for own in parts.values() for text in own[part]} for part in PARTS}
        assert held["test"] == {*mixed[25:35], mixed[0], "w"}
        assert not held["calibration"] & (held["test"] | held["validation"])
        assert not held["validation"] & held["test"]
        gone = {text for texts in left_out.values() for text in texts}
        assert gone == {mixed[0], *mixed[25:33], mixed[36]}

    def test_one_file_serves_for_all_parts(self, tmp_path):
        file = save_texts(tmp_path / "a.jsonl", ["twice", *(f"text {i}" for i in range(9))] * 2)
        parts, _ = documents.make_parts({"a": Sources(text=file)}, Shares())
        assert {part: len(texts) for part, texts in parts["a"].items()} == {
            "calibration": 5,
            "validation": 2,
            "test": 3,
        }
        assert len({text for texts in parts["a"].values() for text in texts}) == 10

    def test_parts_are_written_and_counted(self, tmp_path):
        file = save_texts(tmp_path / "a.jsonl", [f"text {i}" for i in range(10)])
        parts, left_out = documents.make_parts({"a": Sources(text=file)}, Shares())
        documents.write_parts(parts, tmp_path / "data")
        for part in PARTS:
            path = documents.part_path(tmp_path / "data", "a", part)
            assert documents.read_documents(str(path)) == list(parts["a"][part])
        summaries = documents.summarise(parts, left_out, lambda text: len(text.split()))
        assert documents.statement(summaries)[0] == (
            "a: calibration 5 documents (10 tokens), validation 2 documents (4 tokens), "
            "test 3 documents (6 tokens)"
        )

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"text": "alone"}], "a: .* 1 documents cannot be split into 3 parts"),
            ([{"messages": [{"role": "user", "content": "x"}]}], "holds chat messages"),
            ([{"input_ids": [1, 2]}], "holds token ids"),
        ],
    )
    def test_texts_that_cannot_be_split_are_refused(self, rows, message, tmp_path):
        file = tmp_path / "a.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(DamError, match=message):
            documents.make_parts({"a": Sources(text=str(file))}, Shares())

    def test_a_missing_text_is_named(self, tmp_path):
        file = save_texts(tmp_path / "a.jsonl", ["x", "y"])
        with pytest.raises(DamError, match="a has no test text: pass --text, or --test, a=FILE"):
            documents.make_parts({"a": Sources(calibration=file)}, Shares())
