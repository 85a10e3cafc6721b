"""The request: parameters, slices and models of a configuration, and what is wrong with them.

It knows the YAML alone, no file of a model. May import: coefficients, parameters, errors.
Start reading at `check.check_configuration`; every parameter is declared in `parameters`.
"""
