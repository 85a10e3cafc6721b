"""Architectures and weights that dam refuses, before it reads a weight."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architectures.cases import CASES, REFUSED
from tests.architectures.seen import Seen, save_case
from tests.kit.merging import dam, merge
from tests.kit.reads import watched_reads


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_that_cannot_be_fitted_are_refused_before_a_weight_is_read(
    name: str, seen: Callable[[str], Seen]
) -> None:
    found = seen(name)  # which asserts that nothing is read, and nothing left behind
    assert found.refusal is not None
    assert re.search(str(CASES[name].refused), found.refusal)
    assert "`linear`" in found.refusal or found.linear == "fails"


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_other_weights_can_be_refused(name: str, texts: list[Path], tmp_path: Path) -> None:
    models = save_case(CASES[name], tmp_path)
    configuration = dam(models.models, texts, samples=8, other_weights="error")
    with watched_reads() as reads, pytest.raises(Exception, match=r"outside of the decoder \("):
        merge(configuration, tmp_path / "out")
    assert not reads.order


def test_other_weights_that_are_none_are_not_refused(texts: list[Path], tmp_path: Path) -> None:
    models = save_case(CASES["llama"], tmp_path)
    merge(dam(models.models, texts, samples=4, other_weights="error"), tmp_path / "out").load()
