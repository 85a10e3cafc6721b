"""The parts of `examples.benchmarks.quality`, which compares merges of the same models.

settings    sizes and places of a run
documents   texts split into calibration, validation and test, and checked for overlap
texts       the texts of a run: split, written, checked, and read as tokens
methods     the rows: every method with its grid, as mergekit configurations
regmean     RegMean, a program of its own
trials      one merge of a grid, and its losses
results     recovery, the table, JSON and Markdown
run         the whole comparison
"""
