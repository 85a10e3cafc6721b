"""The parts of `examples/benchmarks/quality.py`: merges of the same models, compared.

documents   texts split into calibration, validation and test, and checked for overlap
methods     the rows: every method with its grid, as mergekit configurations
regmean     RegMean, a program of its own
results     recovery, the table, JSON and Markdown
run         these steps in a row
"""
