"""The parts of `examples/benchmarks/cost.py`: what merges of the same models cost.

settings    sizes, and what is swept
rows        the rows: linear, dam replayed, and fits of dam
synthetic   random models of a given shape
texts       a tokenizer and calibration text for them
page_cache  models dropped from it, so that a merge has to read them from storage
results     medians, ratios, the tables, JSON and Markdown
plot        peak memory against what was swept
run         these steps in a row
"""
