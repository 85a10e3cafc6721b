"""The benchmark of merges: RegMean, against the same computed by hand."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from examples.benchmarks.merge_quality import regmean
from tests.kit.models import ARCHITECTURES, VOCAB_SIZE, fine_tune, make_model


class TestRegMean:
    def test_one_layer_is_the_least_squares_fit_of_all_outputs(self):
        torch.manual_seed(0)
        inputs = [torch.randn(40, 6, dtype=torch.float64) for _ in range(3)]
        weights = [torch.randn(5, 6, dtype=torch.float64) for _ in range(3)]
        outputs = [x @ weight.mT for x, weight in zip(inputs, weights, strict=True)]
        oracle = torch.linalg.lstsq(torch.cat(inputs), torch.cat(outputs)).solution.mT
        found = regmean.merged_weight(weights, [x.mT @ x for x in inputs], alpha=1.0)
        torch.testing.assert_close(found, oracle, rtol=1e-4, atol=1e-4)

    def test_off_diagonals_are_scaled(self):
        """At 0 each column is averaged on its own, by the energy of its input."""
        torch.manual_seed(0)
        grams = [x.mT @ x for x in torch.randn(2, 40, 6, dtype=torch.float64)]
        weights = list(torch.randn(2, 5, 6, dtype=torch.float64))
        energy = torch.stack([gram.diagonal() for gram in grams])
        oracle = (energy[:, None] * torch.stack(weights)).sum(0) / energy.sum(0)
        found = regmean.merged_weight(weights, grams, alpha=0.0)
        torch.testing.assert_close(found, oracle, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(regmean.merged_weight(weights, grams, 0.5), oracle, atol=1e-2)

    def test_inputs_that_are_always_0_are_averaged(self):
        grams = [torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([3.0, 0.0]))]
        weights = [torch.tensor([[0.0, 2.0]]), torch.tensor([[4.0, 4.0]])]
        found = regmean.merged_weight(weights, grams, alpha=0.9)
        torch.testing.assert_close(found, torch.tensor([[3.0, 3.0]]).double(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
    def test_a_single_model_stays_as_it_is(self, name):
        model = make_model(ARCHITECTURES[name]())
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        regmean.merge([model], [torch.randint(VOCAB_SIZE, (5, 16))], 0.9)
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[key])

    @pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
    def test_a_model_equals_a_dense_solve_of_every_linear(self, name):
        models = [make_model(ARCHITECTURES[name]()) for _ in range(2)]
        for seed, model in enumerate(models):
            fine_tune(model, seed=seed, scale=0.3)
        tokens = [torch.randint(VOCAB_SIZE, (6, 16)) for _ in range(2)]
        inputs = [recorded_inputs(*each) for each in zip(models, tokens, strict=True)]
        before = [{k: v.clone() for k, v in m.named_parameters()} for m in models]
        layers = {
            n for n, m in models[0].named_modules() if isinstance(m, torch.nn.Linear | Conv1D)
        }
        tied = name != "llama"
        layers -= {"lm_head"} if tied else set()
        assert inputs[0].keys() >= layers
        assert len(layers) >= 8

        regmean.merge(models, tokens, 1.0)

        for key, merged in models[0].named_parameters():
            layer = key.removesuffix(".weight")
            own = [parameters[key].double() for parameters in before]
            if layer in layers:
                transposed = isinstance(models[0].get_submodule(layer), Conv1D)
                columns = own if transposed else [weight.mT for weight in own]
                x = [recorded[layer].double() for recorded in inputs]
                y = [a @ b for a, b in zip(x, columns, strict=True)]
                # gelsd copes with inputs that depend on each other
                oracle = torch.linalg.lstsq(torch.cat(x), torch.cat(y), driver="gelsd").solution
                x_all = torch.cat(x)
                found = (merged if transposed else merged.mT).double()
                torch.testing.assert_close(x_all @ found, x_all @ oracle, rtol=1e-3, atol=1e-3)
                average = torch.stack(columns).mean(0)
                assert not torch.allclose(x_all @ found, x_all @ average, atol=1e-2)
            else:
                torch.testing.assert_close(merged.double(), torch.stack(own).mean(0))


def recorded_inputs(model, tokens):
    """The inputs of every linear layer, [tokens, in_features]."""
    found = {}
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: found.update({name: inputs[0].flatten(0, 1)})
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    ]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return found
