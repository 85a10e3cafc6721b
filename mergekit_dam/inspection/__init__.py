"""What stands in the files of a merge: its coefficients and corrections, alone and of two merges.

May import: coefficients and what lies below. Start reading at `summary.summarised` and
`difference.compared`; `layers` says what is told of each layer, `tables` how it is shown.
"""
