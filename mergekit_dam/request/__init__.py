"""The request: the parameters, slices and models of a configuration, and checks of them.

It reads no weights: only the YAML and the models' configurations. May import: calibration,
coefficients, parameters, errors. Start reading at `check.check_configuration`; `parameters`
declares every parameter.
"""
