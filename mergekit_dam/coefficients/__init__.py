"""Coefficients: how they merge tensors, their affine form, and their file.

May import: parameters, errors. Start reading at `merge.merge_weights`, which fit, search, replay
and writer all call. `tensors` describes one tensor, from its sources to the report of its fit.
"""
