"""Several sources of one model share its sequences."""

from typing import Any

import pytest
import torch

from mergekit_dam.calibration.mixture import divided, parse_sources
from mergekit_dam.errors import CalibrationError


@pytest.fixture
def sources(write: Any) -> tuple[str, str, str]:
    """Three sources, each of one token id."""
    return tuple(write(f"{i}.jsonl", [{"input_ids": [i] * 400}]) for i in (1, 2, 3))


@pytest.mark.parametrize(
    ("options", "samples", "expected"),
    [
        (["", ""], 8, (4, 4)),
        (["", "", ""], 8, (3, 3, 2)),
        ([":share=0.25", ""], 8, (2, 6)),
        ([":share=0.3", ":share=0.7"], 10, (3, 7)),
        ([":share=0.3", "", ""], 10, (3, 4, 3)),
        (["", ":samples=5"], 8, (8, 5)),
        ([":samples=2", ":samples=5"], 8, (2, 5)),
        ([":share=0.1", ":share=0.2", ":share=0.7"], 10, (1, 2, 7)),
    ],
)
def test_sequences_are_divided(
    sources: Any, options: list[str], samples: int, expected: tuple[int, ...]
) -> None:
    texts = tuple(f"{path}{own}" for path, own in zip(sources, options, strict=False))
    assert divided(parse_sources(texts), samples) == expected


def test_the_set_has_the_sequences_of_all_and_every_part_of_it_is_mixed(
    sources: Any, load: Any
) -> None:
    value = (f"{sources[0]}:share=0.25", sources[1])
    loaded = load(value, samples=16)
    own = loaded.tokens[:, 0]
    assert (own == 1).sum() == 4
    assert (own == 2).sum() == 12
    for start in range(0, 16, 4):  # so that held-out sequences, the last ones, are of both
        assert own[start : start + 4].tolist().count(1) == 1
    alone = [load(f"{path}:samples={n}") for path, n in zip(sources, (4, 12), strict=False)]
    assert torch.equal(loaded.tokens[own == 1], alone[0].tokens)
    provenance = loaded.provenance
    assert (provenance.sequences, provenance.tokens_used, provenance.documents_read) == (16, 128, 2)
    assert provenance.files == tuple(sources[:2])
    assert [part.sequences for part in provenance.parts] == [4, 12]
    assert provenance.source == ", ".join(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([":share=0.3", ":share=0.3"], "the shares add up to 0.6: let them add up to 1"),
        ([":share=0.8", ":share=0.3"], "the shares add up to 1.1: let them add up to 1"),
        ([":share=0.8", ":share=0.2", ""], "add up to 1, which leaves nothing for others"),
        ([":share=0.01", ""], "would give none of 8 sequences: raise `samples` or its share"),
        ([":share=0.5"], "`share` divides the sequences among several sources"),
    ],
)
def test_shares_that_do_not_fit_are_refused(
    sources: Any, load: Any, options: list[str], message: str
) -> None:
    value = tuple(f"{path}{own}" for path, own in zip(sources, options, strict=False))
    with pytest.raises(CalibrationError, match=message):
        load(value, samples=8)


def test_a_source_is_listed_once(sources: Any, load: Any) -> None:
    with pytest.raises(CalibrationError, match=r"1\.jsonl' is listed twice"):
        load((sources[0], sources[0]))
