"""Merges by two processes that torchrun starts, against those of one."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.kit.merging import Merged, dam, merge
from tests.kit.models import Models
from tests.kit.processes import difference, finish, start_merges
from tests.kit.texts import Calibration
from tests.kit.worker import counted_tokens

SIZES: dict[str, Any] = {"samples": 16, "sequence_length": 16}
FITS: dict[str, dict[str, Any]] = {
    "identity": {**SIZES, "objective": "layer", "metric": "identity"},
    "correction": {**SIZES, "objective": "layer", "metric": "sensitivity", "correction": "full"},
    "sensitivity": {**SIZES, "objective": "layer", "metric": "sensitivity", "ridge": 0.1},
    "logits": {**SIZES, "objective": "logits", "steps": 8, "learning_rate": 0.02},
    "both": {
        **SIZES,
        "objective": "layer+logits",
        "metric": "sensitivity",
        "ridge": 0.1,
        "steps": 8,
        "learning_rate": 0.01,
    },
    "factors": {
        **SIZES,
        "objective": "layer+logits",
        "correction": "low_rank",
        "correction_rank": 3,
        "steps": 8,
        "learning_rate": 0.01,
    },
    # The second process has neither data to fit nor data to judge one of the models by.
    "few tokens": {
        "samples": 2,
        "sequence_length": 4,
        "objective": "layer+logits",
        "metric": "sensitivity",
        "steps": 2,
        "learning_rate": 0.02,
    },
    "nothing held out": {
        "samples": 5,
        "sequence_length": 32,
        "objective": "layer",
        "metric": "identity",
        "holdout": 0.0,
    },
}
"""Parameters of the merges that are made by one process and by two."""


@pytest.fixture(scope="module")
def folders(
    llama_models: Models, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Where the merges of one process are, and those of two, with the tokens that each ran."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    merges = {name: dam(llama_models.models, calibration, **fit) for name, fit in FITS.items()}
    running = start_merges(merges, two)
    tokens = {}
    for name, configuration in merges.items():
        with counted_tokens() as counts:
            merge(configuration, one / name)
        tokens[name] = counts
    (one / "tokens-0.json").write_text(json.dumps(tokens), encoding="utf-8")
    finish(running)
    return one, two


@pytest.mark.slow
@pytest.mark.parametrize("fit", FITS)
def test_coefficients_are_those_of_one_process(folders: tuple[Path, Path], fit: str) -> None:
    one, two = (Merged(folder / fit) for folder in folders)
    assert difference(two, one) < 1e-6
    outcomes = [{n: entry["outcome"] for n, entry in m.entries.items()} for m in (one, two)]
    assert outcomes[0] == outcomes[1]
    assert [r["kept"] for r in two.report["search"]] == [r["kept"] for r in one.report["search"]]


@pytest.mark.slow
@pytest.mark.parametrize("fit", ["identity", "sensitivity", "logits", "both"])
def test_each_process_takes_half_of_the_work(folders: tuple[Path, Path], fit: str) -> None:
    one, two = folders
    whole = json.loads((one / "tokens-0.json").read_text("utf-8"))[fit]
    shares = [json.loads((two / f"tokens-{rank}.json").read_text("utf-8"))[fit] for rank in (0, 1)]
    for way, tokens in whole.items():
        # A few more: every process probes the model when it divides it into parts.
        assert tokens <= sum(share[way] for share in shares) < 1.005 * tokens
        # A step of a descent takes sequences as they come: on average, half of them.
        for share in shares:
            assert share[way] == pytest.approx(tokens / 2, rel=0.1)


@pytest.mark.slow
def test_one_process_alone_writes(folders: tuple[Path, Path]) -> None:
    one, two = ({path.relative_to(f) for path in f.glob("*/*")} for f in folders)
    assert two == one
    assert {path.name for path in folders[1].iterdir()} == {
        "merges.json",
        "tokens-0.json",
        "tokens-1.json",
        *FITS,
    }
