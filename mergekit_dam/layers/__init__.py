"""The fit of one stage: its units in the order the data passes them, and both streams moved on.

May import: sources, fitting, model, coefficients, streams, parameters, errors. Start reading at
`fit.fit_stage`, then `walk.walk_part` and `groups`.
"""
