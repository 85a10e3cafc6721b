"""Sensitivity, one stage in memory at a time, against autograd of the whole resident model."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from mergekit_dam.coefficients.record import MergeRecord
from mergekit_dam.fitting.metric import Metric
from mergekit_dam.model.hooks import capture, watch
from mergekit_dam.search.backprop import forward
from mergekit_dam.search.sensitivity import Sensitivity, sweep_back
from mergekit_dam.sources.network import Network
from mergekit_dam.streams import stream as streams_module
from mergekit_dam.streams.boundaries import BoundaryStates
from mergekit_dam.streams.counting import token_weights
from tests.kit.models import VOCAB_SIZE
from tests.kit.networks import Made, files_under, make
from tests.kit.tensors import CPU, LENGTH, counted_of

HELD_OUT = 2
Key = tuple[int, int, str]
"""Number of the stage, source, and unit."""


class Drawn:
    """Labels in the order in which they are drawn."""

    def __init__(self) -> None:
        self.labels: list[Tensor] = []

    def __call__(self, probabilities: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.labels.append(torch._C._VariableFunctions.multinomial(probabilities, *args, **kwargs))
        return self.labels[-1]


def measure(
    made: Made,
    point: MergeRecord,
    folder: Path,
    *,
    seed: int = 0,
    resident: Any = "auto",
    counted: Tensor | None = None,
) -> tuple[Sensitivity, Network, list[Tensor]]:
    """Sensitivity with the labels that were drawn for it."""
    drawn, network, data = Drawn(), made.network(resident), made.data(held_out=HELD_OUT)
    entered, left = BoundaryStates(folder / "entered"), BoundaryStates(folder / "left")
    if counted is not None:
        data = [replace(own, weights=token_weights(counted, HELD_OUT)) for own in data]
    fit = [own.of("fit") for own in data]
    hidden = forward(
        network,
        lambda _, opened: opened.merged_weights(point),
        [own.merged[:] for own in fit],
        entered,
    )
    streams = [replace(own, merged=x) for own, x in zip(fit, hidden, strict=True)]
    with mock.patch.object(torch, "multinomial", drawn), torch.no_grad():
        found = sweep_back(
            network,
            point,
            streams,
            entered=entered,
            left=left,
            seed=seed,
        )
    return found, network, drawn.labels


def metrics_of(sensitivity: Sensitivity, network: Network) -> Iterator[tuple[Key, Metric]]:
    """Every metric of every block."""
    for number in range(1, len(network.stages) - 1):
        opened = network.open(number)
        anatomy = opened.anatomy(torch.zeros(1, 4, 16))
        with torch.no_grad():
            for (source, unit), metric in sensitivity.metrics(number, opened, anatomy).items():
                assert isinstance(metric, Metric)  # of models without experts
                yield (number, source, unit), metric


def plain_gradients(
    made: Made, point: MergeRecord, labels: list[Tensor], each: Tensor | None = None
) -> tuple[dict[Key, Tensor], dict[tuple[int, int], Tensor]]:
    """Gradients at all outputs of linears `[tokens, out]`, and at what leaves each block.

    Of the sum over tokens of `-log p(label)`, by autograd of the whole model in fp64.

    Args:
        each: Weights of the tokens `[sequences, length]`, whose products are to count; tokens
            of weight 0 have no labels.
    """
    rows = {n: c.double() for n, c in point.coefficients.items()}
    weights = made.differentiable(rows, point.axes)
    blocks = [made.decoder.names.block_name(i) for i in range(len(made.decoder.blocks))]
    linears = [
        c.name.removesuffix(".weight") for c in made.coordinates.values() if c.kind == "linear"
    ]
    inner: dict[Key, Tensor] = {}
    left: dict[tuple[int, int], Tensor] = {}
    remaining = iter(labels)
    for own in made.data(held_out=HELD_OUT):
        tokens = own.merged[:-HELD_OUT]
        factors = torch.ones(tokens.shape) if each is None else each.sqrt()
        own_labels = torch.zeros_like(tokens)
        for row in range(len(tokens)):
            if factors[row].any():
                own_labels[row, factors[row] > 0] = next(remaining).squeeze(1)
        live = {n: w.requires_grad_() for n, w in weights.items()}
        leaving: dict[str, Tensor] = {}
        handles = [
            made.plain.get_submodule(b).register_forward_hook(partial(_keep, leaving, b))
            for b in blocks
        ]
        with watch(made.plain, tuple(linears)) as seen:
            output = functional_call(made.plain, live, (tokens,), {"use_cache": False})
        for handle in handles:
            handle.remove()
        chosen = output.logits.log_softmax(-1).gather(-1, own_labels[..., None])[..., 0]
        loss = -(factors.double() * chosen).sum()
        wanted = [*(seen[n] for n in linears), *(leaving[b] for b in blocks)]
        found = torch.autograd.grad(loss, wanted)
        for name, gradient in zip(linears, found, strict=False):
            number = next(i for i, b in enumerate(blocks) if name.startswith(f"{b}.")) + 1
            unit = name.removeprefix(f"{blocks[number - 1]}.")
            inner[number, own.source, unit] = gradient.reshape(-1, gradient.shape[-1])
        for index, gradient in enumerate(found[len(linears) :]):
            left[index + 1, own.source] = gradient
    assert next(remaining, None) is None
    return inner, left


def test_tokens_that_do_not_count_have_no_loss(tmp_path: Path) -> None:
    made, counted = make(), counted_of(5)
    point = made.point(scale=0.05)
    sensitivity, network, labels = measure(made, point, tmp_path, counted=counted)
    weights = token_weights(counted, HELD_OUT)[:-HELD_OUT]
    inner, left = plain_gradients(made, point, labels, weights)
    states = BoundaryStates(tmp_path / "left")
    for (number, source), gradient in left.items():
        assert_equal_to_scale(states.get(number)[source], gradient)
    last = max(number for number, _ in left)
    assert not states.get(last)[0][~counted[:-HELD_OUT]].any()
    for key, metric in metrics_of(sensitivity, network):
        identity = torch.eye(inner[key].shape[1], dtype=torch.float64)
        expected = Metric.of_gradients(inner[key].float())
        assert_equal_to_scale(metric(identity), expected(identity), 1e-4)


def _keep(kept: dict[str, Tensor], name: str, _: object, args: object, output: Any) -> None:
    kept[name] = output[0] if isinstance(output, tuple) else output


def assert_equal_to_scale(found: Tensor, expected: Tensor, accuracy: float = 2e-5) -> None:
    """To a fraction of the largest entry."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=accuracy * scale)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma2", "falcon", "gpt-neox"])
def test_metrics_of_all_linears_are_those_of_plain_autograd(name: str, tmp_path: Path) -> None:
    made = make(name)
    point = made.point(scale=0.05)
    sensitivity, network, labels = measure(made, point, tmp_path)
    inner, left = plain_gradients(made, point, labels)
    for (number, source), gradient in left.items():
        assert_equal_to_scale(BoundaryStates(tmp_path / "left").get(number)[source], gradient)
    found = dict(metrics_of(sensitivity, network))
    assert found.keys() == inner.keys()
    for key, metric in found.items():
        identity = torch.eye(inner[key].shape[1], dtype=torch.float64)
        expected = Metric.of_gradients(inner[key].float())
        assert_equal_to_scale(metric(identity), expected(identity), 1e-4)


def test_held_out_sequences_have_no_gradients(tmp_path: Path) -> None:
    made = make()
    measure(made, made.point(scale=0.05), tmp_path)
    for stream in BoundaryStates(tmp_path / "left").get(1):
        assert stream.shape == (5 - HELD_OUT, LENGTH, 16)


def test_labels_are_drawn_from_the_merged_models_own_distribution(tmp_path: Path) -> None:
    made = make()
    point = made.point(scale=0.05)
    weights = made.differentiable(
        {n: c.double() for n, c in point.coefficients.items()}, point.axes
    )
    expected = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
    for own in made.data(held_out=HELD_OUT):
        with torch.no_grad():
            expected += made.logits(weights, own.merged[:-HELD_OUT]).softmax(-1).sum((0, 1))
    counts, draws = torch.zeros(VOCAB_SIZE, dtype=torch.float64), 10
    for seed in range(draws):
        drawn = torch.cat(measure(made, point, tmp_path, seed=seed)[2]).flatten()
        counts += torch.bincount(drawn, minlength=VOCAB_SIZE)
    assert counts.sum() == pytest.approx(draws * float(expected.sum()))
    # Counts vary by no more than those of independent draws.
    deviation = (counts - draws * expected) / (draws * expected).sqrt()
    assert float(deviation.square().mean()) < 2


@pytest.mark.parametrize("resident", ["always", "never"])
def test_the_same_seed_gives_the_same_bytes_resident_or_not(resident: Any, tmp_path: Path) -> None:
    made = make()
    point = made.point(scale=0.05)
    first = dict(metrics_of(*measure(made, point, tmp_path / "a")[:2]))
    again = dict(metrics_of(*measure(made, point, tmp_path / "b", resident=resident)[:2]))
    other = dict(metrics_of(*measure(made, point, tmp_path / "c", seed=1)[:2]))
    for key, metric in first.items():
        identity = torch.eye(_outputs(made, key), dtype=torch.float64)
        assert metric(identity).equal(again[key](identity))
        assert not metric(identity).equal(other[key](identity))


def _outputs(made: Made, key: Key) -> int:
    number, _, unit = key
    name = f"{made.decoder.names.block_name(number - 1)}.{unit}.weight"
    return made.weights[0][name].shape[0]


def test_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make()
    point = made.point(scale=0.05)
    whole = dict(metrics_of(*measure(made, point, tmp_path / "a")[:2]))
    monkeypatch.setattr(streams_module, "CHUNK_TOKENS", LENGTH)
    chunked = dict(metrics_of(*measure(made, point, tmp_path / "b")[:2]))
    for key, metric in whole.items():
        identity = torch.eye(_outputs(made, key), dtype=torch.float64)
        assert_equal_to_scale(chunked[key](identity), metric(identity))


def test_one_token_with_huge_gradients_does_not_take_the_metric_over(tmp_path: Path) -> None:
    """As the first token of a sequence, or a delimiter, may have."""
    made = make()
    sensitivity, network, _ = measure(made, made.point(scale=0.05), tmp_path)
    before = dict(metrics_of(sensitivity, network))
    boundaries = BoundaryStates(tmp_path / "left")
    for number in range(1, len(network.stages) - 1):
        streams = boundaries.get(number)
        for stream in streams:
            stream[0, 0] *= 1e4  # the first: it looks at no other token
        boundaries.put(number, streams)
    for key, metric in metrics_of(sensitivity, network):
        identity = torch.eye(_outputs(made, key), dtype=torch.float64)
        assert float(metric(identity).trace()) < 10 * float(before[key](identity).trace()), key


def test_files_are_nothing_but_what_enters_and_leaves_blocks(tmp_path: Path) -> None:
    made = make()
    measure(made, made.average(), tmp_path)
    blocks = len(made.decoder.blocks)
    files = [name for name in files_under(tmp_path) if name.endswith(".safetensors")]
    assert len(files) == 2 * blocks
    assert len(files_under(tmp_path)) == len(files) + 2  # and the folders of the two shelves


def test_watched_outputs_are_where_gradients_pass() -> None:
    """Also where a block adds to an output in place later on."""
    root = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(inplace=True))
    x = torch.randn(5, 3, device=CPU)
    with watch(root, ("0",)) as seen:
        left = root(x)
    (gradient,) = torch.autograd.grad(left.sum(), seen["0"])
    assert gradient.equal((seen["0"] > 0).float())
    with capture(root, outputs=("0",)) as captured:
        root(x)
    assert seen["0"].equal(captured.outputs["0"])
    assert not root[0]._forward_hooks
