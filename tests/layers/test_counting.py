"""Tokens that do not count have no influence on what judges layer fits, nor on the head's fit."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from mergekit_dam.layers import judged_tokens
from mergekit_dam.layers.head import fit_head
from mergekit_dam.layers.targets import token_weights
from mergekit_dam.model.part import output_part
from mergekit_dam.streams import counting
from mergekit_dam.streams.stream import Stream
from tests.kit.models import ARCHITECTURES, fine_tunes
from tests.kit.settings import tensor_settings
from tests.kit.tensors import LENGTH, counted_of, randn, tokens_of
from tests.kit.walks import Merge, walk_of

HELD_OUT, SEEN = 3, LENGTH - 4
"""Held-out sequences, and tokens at the beginning of each that may count."""


def fitted(name: str, data: Mapping[int, Tensor], counted: Tensor | None) -> list[object]:
    """What a merge writes and reports."""
    config = ARCHITECTURES[name]()
    streams = [Stream.of_tokens(k, x, HELD_OUT, counted=counted) for k, x in data.items()]
    settings = tensor_settings(2)
    merged, record = Merge(config, fine_tunes(config, 2), streams, settings).run()
    told = [
        (r.name, r.outcome, r.held_out_start, r.held_out_fitted) for r in record.reports.values()
    ]
    return [*told, *(merged[name].tolist() for name in sorted(merged))]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_held_out_tokens_that_do_not_count_judge_nothing(
    name: str, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token that counts comes behind them, so that they are not even its context."""
    counted = counted_of(8)
    counted[:, SEEN:] = False
    if every > 1:
        judging = int(counted[-HELD_OUT:].sum())
        monkeypatch.setattr(judged_tokens, "TOKENS", judging // every)
    data = {k: tokens_of(k) for k in range(2)}
    other = {k: x.clone() for k, x in data.items()}
    for k, x in other.items():
        x[-HELD_OUT:, SEEN:] = tokens_of(k + 10, HELD_OUT, LENGTH - SEEN)
    assert fitted(name, data, counted) == fitted(name, other, counted)
    assert fitted(name, data, None) != fitted(name, other, None)
    assert fitted(name, data, counted) != fitted(name, data, None)


def test_weights_of_tokens_go_by_those_that_count() -> None:
    targets, counted = randn(24, 5), counted_of(2)
    counted[0, :3] = True
    mask = counted.reshape(-1)
    weights = token_weights([targets], 2, mask)
    assert not weights[~mask].any()
    for row in range(2):
        own = mask.reshape(2, -1)[row]
        alone = token_weights([targets.reshape(2, LENGTH, 5)[row][own]], 1)
        torch.testing.assert_close(weights.reshape(2, -1)[row][own], alone)


@torch.no_grad()
def test_the_head_is_fitted_to_the_tokens_that_count() -> None:
    counted = counted_of(6)
    x = randn(6, LENGTH, 16)
    other = torch.where(counted[..., None], x, 3 * randn(6, LENGTH, 16, seed=1))
    found = []
    for entering in (x, other):
        walk, _ = walk_of(
            "llama", output_part, entering, 0.0, correction="low_rank", correction_rank=2
        )
        walk.streams[0].weights = counting.token_weights(counted, 0)
        unit = next(unit for unit in walk.anatomy.units if unit.name == "lm_head")
        ((_, head),) = fit_head(walk, unit, temperature=1.0)
        assert head.report.outcome == "fitted"
        found.append(head)
    # The first sequence, of which nothing counts, gives the size of what enters.
    start, after = found[0].report.held_out_start, found[0].report.held_out_fitted
    assert start is not None
    assert after is not None
    assert after < 0.9 * start
    assert found[1].report.held_out_start == pytest.approx(start)
    assert found[1].coefficients.equal(found[0].coefficients)
