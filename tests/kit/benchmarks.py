"""Helpers of the tests of benchmarks."""

from examples.benchmarks.merge_cost.settings import Shape

TINY_SHAPE = Shape(layers=2, hidden=16, intermediate=24, vocab=512, models=2, dtype="float32")


def never(command, log):
    raise AssertionError("a merge was started")


def cells_of(table):
    """The table's rows by name, as what stands in each column."""
    header, _, *lines = [
        [cell.strip() for cell in line.replace("\\|", "/").strip("|").split("|")]
        for line in table.splitlines()
    ]
    return {cells[0]: dict(zip(header, cells, strict=True)) for cells in lines}
