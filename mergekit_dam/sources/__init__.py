"""The models' tensors, one stage of the model at a time.

May import: model, coefficients, streams, vocabulary, parameters, errors. Start reading at
`stage.Stage`; `network.Network` is all stages, opened one after the other.
"""
