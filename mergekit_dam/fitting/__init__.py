"""The mathematics of a fit: sufficient statistics, metrics, and exact minimisers.

Pure functions of tensors. May import: coefficients, streams, errors. Start reading at
`linear.fit_linear`; `moments` holds the sums over the data, `solver` finds the coefficients.
"""
