"""Trials of coefficients for the whole model, each judged on held-out data.

May import: layers and what lies below. Start reading at `search.search`; the end-to-end objective
is `gradient`, its descent `descend`, the metric of layer fits `sensitivity`.
"""
