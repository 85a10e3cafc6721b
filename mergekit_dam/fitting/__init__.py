"""The fit of coefficients: moments of activations, solvers, and the walk through the model."""
