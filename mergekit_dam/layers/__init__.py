"""The fit of one stage: fits its units in forward order, then runs both streams through it.

May import: sources, fitting, model, coefficients, streams, parameters, errors. Start reading at
`fit.fit_stage`, then `walk.walk_part` and `groups`.
"""
