"""Hub datasets, with `load_dataset` replaced by one that streams local rows."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch

from mergekit_dam.calibration.hub import resolve_revision
from mergekit_dam.calibration.source import CalibrationSource
from mergekit_dam.errors import CalibrationError


class FakeHub:
    """Records how the dataset was asked for; streams `rows` or raises `error`."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self.asked: dict[str, Any] = {}
        self.read = 0

    def load_dataset(self, path: str, **asked: Any) -> datasets.IterableDataset:
        self.asked = {"path": path, **asked}
        if self.error is not None:
            raise self.error

        def generate() -> Iterator[dict[str, Any]]:
            for row in self.rows:
                self.read += 1
                yield row

        return datasets.IterableDataset.from_generator(generate)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha="c0ffee")
    )
    return fake


def test_a_dataset_is_streamed_pinned_and_recorded(
    hub: FakeHub, texts: list[str], load: Any
) -> None:
    hub.rows = [{"body": text, "id": i} for i, text in enumerate(texts)]
    calibration = load("org/german-corpus:name=de:column=body")
    assert hub.asked == {
        "path": "org/german-corpus",
        "name": "de",
        "split": "train",
        "revision": "c0ffee",
        "streaming": True,
    }
    provenance = calibration.provenance
    assert (provenance.dataset, provenance.revision, provenance.split) == (
        "org/german-corpus",
        "c0ffee",
        "train",
    )
    assert provenance.files == ()
    assert torch.equal(calibration.tokens, load("org/german-corpus:column=body").tokens)


def test_a_dataset_is_read_no_further_than_needed(hub: FakeHub, load: Any) -> None:
    hub.rows = [{"text": f"the quick brown fox number {i}"} for i in range(5000)]
    provenance = load("org/corpus").provenance
    assert hub.read < 1200  # datasets' shuffle buffer and a window
    assert "were read" in provenance.cut[0]


def test_another_seed_reads_other_documents(hub: FakeHub, texts: list[str], load: Any) -> None:
    hub.rows = [{"text": text} for text in texts]
    tokens = [load("org/corpus", seed=seed).tokens for seed in (1, 2)]
    assert not torch.equal(*tokens)


def test_without_the_hubs_answer_the_revision_is_the_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    assert resolve_revision(CalibrationSource.parse("org/corpus@v1")) == "v1"
    assert resolve_revision(CalibrationSource.parse("org/corpus")) is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'org/c' doesn't exist on the Hub"),
            r"'org/c' is neither a path here \(/.*/org/c does not exist\) nor a dataset that the "
            "Hub shows you .*hf auth login",
        ),
        (
            ConnectionError("Couldn't reach 'org/c' on the Hub"),
            "'org/c' cannot be read because the Hugging Face Hub is out of reach .*local file",
        ),
        (
            ValueError("Bad split: train. Available splits: ['test']"),
            r"has no split 'train' .*\['test'\].*`org/c:split=\.\.\.`",
        ),
        (
            ValueError("Config name is missing.\nPlease pick one among ['a', 'b']"),
            r"has several configurations .*\['a', 'b'\].*`org/c:name=\.\.\.`",
        ),
        (RuntimeError("Dataset scripts are no longer supported"), "RuntimeError: Dataset scripts"),
    ],
)
def test_errors_of_the_hub_are_reported_with_the_remedy(
    hub: FakeHub, load: Any, error: Exception, message: str
) -> None:
    hub.error = error
    with pytest.raises(CalibrationError, match=message):
        load("org/c")


def test_a_wrong_column_of_a_dataset_lists_its_columns(hub: FakeHub, load: Any) -> None:
    hub.rows = [{"question": "a", "answer": "b"}]
    with pytest.raises(CalibrationError, match="document 1 of the shuffled stream has none of"):
        load("org/corpus")
    with pytest.raises(CalibrationError, match="columns are 'question', 'answer': did you mean"):
        load("org/corpus:column=anwser")


def test_an_empty_dataset_is_refused(hub: FakeHub, load: Any) -> None:
    with pytest.raises(CalibrationError, match="'org/corpus' holds no text"):
        load("org/corpus")
