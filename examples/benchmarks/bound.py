"""Where the time of a merge goes, and the least time that this machine would need for it.

    python -m examples.benchmarks.bound dam.yaml --threads 2

The merge runs in this process. Every operation of torch is timed, and its floating-point operations
are counted. The bound is their number divided by the rate that the machine reaches at large
matrices, plus the bytes of the models and of the result divided by the rates of the disk.
"""

import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_SOLVES = {torch.ops.aten.linalg_cholesky_ex, torch.ops.aten.linalg_cholesky}


@dataclass
class Work:
    """Operations of one kind: wall seconds and floating-point operations."""

    seconds: float = 0.0
    flops: float = 0.0


class Timer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Times every operation; products and factorisations by the dtype they are computed in."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kinds: dict[str, Work] = defaultdict(Work)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        started = time.perf_counter()
        out = func(*args, **kwargs)
        seconds = time.perf_counter() - started
        packet = func._overloadpacket
        if packet in _SOLVES:
            kind = f"Cholesky in {str(args[0].dtype).removeprefix('torch.')}"
            flops = float(args[0].shape[-1]) ** 3 / 3 * args[0].shape[:-2].numel()
        elif packet in flop_registry:
            kind = f"products in {str(args[0].dtype).removeprefix('torch.')}"
            flops = float(flop_registry[packet](*args, **kwargs, out_val=out))
        else:
            kind, flops = f"  {packet}".replace("aten.", ""), 0.0
        work = self.kinds[kind]
        work.seconds += seconds
        work.flops += flops
        return out


@dataclass(frozen=True)
class Rates:
    """Rates of the machine: flops per second by kind, and bytes per second of the disk."""

    flops: dict[str, float]
    read: float
    write: float

    def or_faster(self, other: "Rates") -> "Rates":
        """The faster rates of two measurements: other programs may have run during either."""
        flops = {kind: max(rate, other.flops[kind]) for kind, rate in self.flops.items()}
        return Rates(flops, max(self.read, other.read), max(self.write, other.write))


def measure_rates(files: list[Path], folder: Path) -> Rates:
    """Rates at a 2048 x 2048 product and a 4096 x 4096 factorisation, and of the disk.

    Args:
        files: files to read; they are dropped from the page cache before.
        folder: folder to write to.
    """
    flops = {}
    for dtype in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        a = torch.randn(2048, 2048, dtype=dtype)
        flops[f"products in {name}"] = 2 * 2048**3 / _fastest(lambda a=a: a @ a)  # type: ignore[misc]
        gram = 4096 * torch.eye(4096, dtype=dtype) + 1
        seconds = _fastest(lambda gram=gram: torch.linalg.cholesky(gram))  # type: ignore[misc]
        flops[f"Cholesky in {name}"] = 4096**3 / 3 / seconds
    return Rates(flops, _read_rate(files), _write_rate(folder))


def _fastest(run: Callable[[], Any], times: int = 3) -> float:
    def once() -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    return min(once() for _ in range(times))


def _read_rate(files: list[Path]) -> float:
    size, seconds = 0, 0.0
    for path in files:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            while data := file.read(1 << 24):
                size += len(data)
            seconds += time.perf_counter() - started
    return size / seconds


def _write_rate(folder: Path, size: int = 1 << 28) -> float:
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())
        return size / (time.perf_counter() - started)


def weight_files(config: Path) -> list[Path]:
    """Safetensors of all models that a configuration names by path."""
    from mergekit.config import MergeConfiguration

    parsed = MergeConfiguration.model_validate(yaml.safe_load(config.read_text()))
    models = parsed.referenced_models()
    return [file for m in models for file in sorted(Path(m.model.path).glob("*.safetensors"))]


def shortened(kinds: dict[str, Work], shown: int = 10) -> dict[str, Work]:
    """The kinds by their seconds, longest first, with those beyond the first few as one."""
    ordered = sorted(kinds.items(), key=lambda item: (not item[1].flops, -item[1].seconds))
    rest = [work for _, work in ordered[shown:]]
    other = Work(sum(work.seconds for work in rest), sum(work.flops for work in rest))
    return {**dict(ordered[:shown]), f"  {len(rest)} other operations": other}


@dataclass(frozen=True)
class Outcome:
    """A merge that was run, beside the rates of the machine.

    Attributes:
        kinds: the operations of torch, by kind.
        seconds: wall time of the whole merge.
        disk: seconds that reading the models and writing the result would take.
    """

    kinds: dict[str, Work]
    seconds: float
    disk: float
    rates: Rates


def measure(config: Path, options: tuple[str, ...]) -> Outcome:
    """Run the merge, and measure the rates of the machine before and after it."""
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    with tempfile.TemporaryDirectory(prefix="bound-", dir=Path.cwd()) as folder:
        files = weight_files(config)
        rates = measure_rates(files, Path(folder))
        out = Path(folder) / "out"
        timer, started = Timer(), time.perf_counter()
        with timer:
            mergekit_yaml([str(config), str(out), *options], standalone_mode=False)
        seconds = time.perf_counter() - started
        rates = rates.or_faster(measure_rates(files, Path(folder)))
        read = sum(file.stat().st_size for file in files)
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return Outcome(timer.kinds, seconds, read / rates.read + written / rates.write, rates)


def table(found: Outcome) -> str:
    """Where the time went, beside the bound."""
    bound = found.disk
    rows = [["", "seconds", "share", "Gflop", "Gflop/s", "at best", "bound, s"]]
    for kind, work in shortened(found.kinds).items():
        rate = found.rates.flops.get(kind, math.inf)
        bound += work.flops / rate
        row = [kind, f"{work.seconds:.1f}", f"{work.seconds / found.seconds:.0%}"]
        if work.flops:
            row += [f"{work.flops / 1e9:.0f}", f"{work.flops / 1e9 / work.seconds:.1f}"]
            row += [f"{rate / 1e9:.1f}", f"{work.flops / rate:.1f}"]
        rows.append(row)
    rest = found.seconds - sum(work.seconds for work in found.kinds.values())
    rows.append(["outside of torch", f"{rest:.1f}", f"{rest / found.seconds:.0%}"])
    rows.append(["disk", *[""] * 5, f"{found.disk:.1f}"])
    rows.append(["in all", f"{found.seconds:.1f}", *[""] * 4, f"{bound:.1f}"])
    lines = [f"{row[0]:<22}" + "".join(f"{cell:>10}" for cell in row[1:]) for row in rows]
    lines.append(f"{found.seconds / bound:.2f} times the bound")
    if any(work.flops / rate > work.seconds for work, rate in _beside_rates(found)):
        lines.append("no bound: the merge was faster than these rates; other programs were running")
    return "\n".join(lines)


def _beside_rates(found: Outcome) -> list[tuple[Work, float]]:
    known = found.rates.flops
    return [(work, known[kind]) for kind, work in found.kinds.items() if kind in known]


@click.command(help=__doc__.partition("\n")[0])
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=torch.get_num_threads(),
    help="Threads of torch.  [default: torch's own]",
)
@click.argument("options", nargs=-1)
def main(config: Path, threads: int, options: tuple[str, ...]) -> None:
    """Run the merge and print the table. OPTIONS are passed on to mergekit-yaml."""
    torch.set_num_threads(threads)
    click.echo(table(measure(config, options)))


if __name__ == "__main__":
    main()
