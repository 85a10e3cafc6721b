"""The mathematics of a fit: sufficient statistics, metrics, and exact minimisers.

Pure functions of tensors. May import: coefficients, streams, errors. Start reading at
`linear.fit_linear`; `moments` says what it knows of the data, `solver` how it is solved.
"""
