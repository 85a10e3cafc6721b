"""What coefficients are: how they merge tensors, their affine form, their file.

May import: parameters, errors. Start reading at `merge.merge_weights`, which fit, search, replay
and writer all call; `tensors` is one tensor on its way through the fit.
"""
