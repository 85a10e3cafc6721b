"""Merges by two processes that torchrun starts, against those of one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
import torch.distributed as dist
import yaml
from mergekit.options import MergeOptions

from mergekit_dam.errors import DamError
from mergekit_dam.host.output import no_half_written_model
from mergekit_dam.search.data import Data
from mergekit_dam.search.descend import batches_of
from mergekit_dam.streams import distributed
from mergekit_dam.streams.share import Split
from mergekit_dam.streams.stream import Stream
from tests.merging import Merged, dam, merge
from tests.models import Models
from tests.shared_merges import counted_tokens

Calibration = tuple[Path, Path]
BIN = Path(sys.executable).parent
SPLITS: tuple[Split, ...] = ("fit", "held_out")

SIZES: dict[str, Any] = {"samples": 16, "sequence_length": 16}
FITS: dict[str, dict[str, Any]] = {
    "identity": {**SIZES, "objective": "layer", "metric": "identity"},
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


def torchrun(*command: str | Path) -> subprocess.Popen[str]:
    """Start two processes of a command."""
    return subprocess.Popen(
        [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", *map(str, command)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def difference(found: Merged, expected: Merged) -> float:
    """The largest difference of a coefficient, relative to the largest of its tensor."""
    ours, theirs = found.coefficients.coefficients, expected.coefficients.coefficients
    assert ours.keys() == theirs.keys()
    gaps = ((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max() for n in theirs)
    return max(float(gap) for gap in gaps)


@pytest.fixture(scope="module")
def folders(
    llama_models: Models, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Where the merges of one process are, and those of two, with the tokens that each ran."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    merges = {name: dam(llama_models.models, calibration, **fit) for name, fit in FITS.items()}
    (two / "merges.json").write_text(json.dumps(merges), encoding="utf-8")
    running = torchrun("-m", "tests.shared_merges", two)
    tokens = {}
    for name, configuration in merges.items():
        with counted_tokens() as counts:
            merge(configuration, one / name)
        tokens[name] = counts
    (one / "tokens-0.json").write_text(json.dumps(tokens), encoding="utf-8")
    output, _ = running.communicate(timeout=300)
    assert running.returncode == 0, output
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


def killed_when(ready: Callable[[], bool], running: subprocess.Popen[str]) -> str:
    """Kill the second of two processes when the merge is so far; what they printed.

    Raises:
        subprocess.TimeoutExpired: the first does not end within a minute.
    """
    deadline = time.monotonic() + 120
    while not ready():
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (second,) = (
        process
        for process in psutil.Process(running.pid).children()
        if process.environ().get("RANK") == "1"
    )
    second.kill()
    output, _ = running.communicate(timeout=60)
    return output


KILLED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    # Shards are written while later stages are fitted; the last, the head, takes a while.
    "one sweep": (
        {"samples": 40, "sequence_length": 32, "holdout": 0.8},
        ["--out-shard-size", "2K"],
        "model-*",
    ),
    "search": ({"objective": "logits", "steps": 100_000}, [], ".dam-*/entered/*"),
}
"""Parameters, options, and files that tell that the fit is under way."""


@pytest.mark.slow
@pytest.mark.parametrize("fit", KILLED)
def test_a_killed_process_stops_the_other_and_leaves_a_clean_folder(
    llama_models: Models, calibration: Calibration, tmp_path: Path, fit: str
) -> None:
    parameters, options, files = KILLED[fit]
    configuration, out = tmp_path / "dam.yaml", tmp_path / "out"
    configuration.write_text(
        yaml.safe_dump(dam(llama_models.models, calibration, **parameters)), encoding="utf-8"
    )
    running = torchrun("--no-python", BIN / "mergekit-yaml", configuration, out, *options)
    output = killed_when(lambda: any(out.glob(files)), running)
    # The other says that one has stopped, unless torchrun ends it before it notices.
    assert running.returncode != 0, output
    assert not out.exists()


def test_a_sum_that_fails_says_that_another_process_has_stopped() -> None:
    broken = mock.Mock(side_effect=RuntimeError("Connection closed by peer"))
    with (
        mock.patch.object(distributed, "_several", lambda: True),
        mock.patch.object(dist, "all_reduce", broken),
        pytest.raises(DamError, match="another process of this merge has stopped"),
    ):
        distributed.all_sum(torch.zeros(3))


def test_alone_nothing_is_set_up() -> None:
    options, x = MergeOptions(), torch.arange(3.0)
    with distributed.joined_processes(options) as own:
        assert own is options
        assert not dist.is_initialized()
        assert distributed.is_first()
        assert (distributed.rank(), distributed.size()) == (0, 1)
        assert distributed.all_sum(x) is x
        assert distributed.all_rows(x) is x
        assert distributed.all_sums([1.0, 2.0]) == [1.0, 2.0]
        assert distributed.from_first(lambda: 5) == 5


@contextmanager
def process(rank: int, size: int) -> Iterator[None]:
    """Be one of several processes, as far as the division of the sequences goes."""
    with (
        mock.patch.object(distributed, "rank", lambda: rank),
        mock.patch.object(distributed, "size", lambda: size),
    ):
        yield


def streams_of(size: int, count: int, held_out: int, turn: int) -> list[Stream]:
    """The streams of all processes; every sequence is its number."""
    tokens = torch.arange(count)[:, None].expand(-1, 3)
    found = []
    for rank in range(size):
        with process(rank, size):
            found.append(Stream.of_tokens(0, tokens, held_out, turn=turn))
    return found


@pytest.mark.parametrize("turn", [0, 1, 2])
@pytest.mark.parametrize(("count", "held_out"), [(7, 2), (8, 0), (2, 1), (4, 4)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_sequence_is_one_process_s(size: int, count: int, held_out: int, turn: int) -> None:
    streams = streams_of(size, count, held_out, turn)
    expected = {"fit": range(count - held_out), "held_out": range(count - held_out, count)}
    for split in SPLITS:
        seen = [n for s in streams for n in s.teacher[slice(*s.border(split))][:, 0].tolist()]
        assert sorted(seen) == list(expected[split])
        assert {s.count(split) for s in streams} == {len(expected[split])}
    sizes = [len(s.own) for s in streams]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("size", [2, 3])
def test_batches_of_all_processes_make_those_of_one(size: int) -> None:
    def batches(stream: Stream) -> list[set[int]]:
        tokens = stream.merged
        assert isinstance(tokens, torch.Tensor)
        data = [Data(0, 1.0, tokens, tokens, stream.held_out, stream.numbers)]
        drawn = batches_of(data, 2, seed=3)
        found = []
        for _ in range(8):
            (batch,) = next(drawn)
            assert batch.total_tokens == 2 * 3
            found.append(set(batch.tokens[:, 0].tolist()))
        return found

    (alone,) = map(batches, streams_of(1, 9, 2, turn=1))
    shares = list(map(batches, streams_of(size, 9, 2, turn=1)))
    for number, whole in enumerate(alone):
        assert set.union(*(share[number] for share in shares)) == whole
        assert sum(len(share[number]) for share in shares) == len(whole)


def test_what_judges_is_numbered_from_its_own_first() -> None:
    for stream in streams_of(2, 7, 3, turn=0):
        tokens = stream.merged
        assert isinstance(tokens, torch.Tensor)
        data = Data(0, 1.0, tokens, tokens, stream.held_out, stream.numbers)
        held_out = data.of("held_out")
        assert [4 + n for n in held_out.own] == held_out.tokens[:, 0].tolist()
        assert held_out.stream(held_out.tokens).count("held_out") == 3


@pytest.fixture
def terminable() -> Iterator[None]:
    """SIGTERM as it is for a program that never asked for it."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("terminable")
def test_a_terminated_merge_leaves_a_clean_folder(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), no_half_written_model(tmp_path / "out"):
        (tmp_path / "out" / ".dam-1").mkdir(parents=True)
        (tmp_path / "out" / "model-1.safetensors").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
