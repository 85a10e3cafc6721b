"""The parts of `examples.benchmarks.cost`, which measures what merges of the same models cost.

settings    sizes of a run, and sweeps over them
methods     the rows: linear, dam replayed, and fits of dam
synthetic   random models of a given shape
texts       a tokenizer and calibration text for them
page_cache  drops models from it, so that a merge has to read them from storage
results     medians, ratios, the tables, JSON and Markdown
plot        peak memory against the swept size
run         the whole measurement
"""
