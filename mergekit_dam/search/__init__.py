"""Tries coefficients for the whole model and judges each trial on held-out data.

May import: layers and what lies below. Start reading at `search.search`; `gradient` has the
end-to-end objective, `descend` its minimisation, `sensitivity` the metric of layer fits.
"""
