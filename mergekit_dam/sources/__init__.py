"""The models' tensors, one stage of the model at a time.

May import: model, coefficients, streams, vocabulary, parameters, errors. Start reading at
`stage.Stage`; `network.Network` holds all stages and opens them one after the other.
"""
