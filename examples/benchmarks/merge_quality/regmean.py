"""RegMean (https://arxiv.org/abs/2212.09849), as a program that can be measured.

    python regmean.py JOB.json OUT_FOLDER

Of every linear layer the merged weight is the one whose outputs are nearest, in squares summed over
the models' own inputs, to what each model's own weight makes of them:

    W^T = (sum_k G_k)^-1  sum_k G_k W_k^T          G_k = X_k^T X_k, off-diagonals times alpha

Everything else, and a head tied to the embedding, is averaged. All models are in memory.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mergekit_dam.calibration.load import load_calibration

_RIDGE = 1e-6  # of the mean diagonal, toward the average: inputs that are always 0 leave it there
_BATCH = 4  # sequences per forward pass


@dataclass(frozen=True, kw_only=True)
class Job:
    """The models to merge, and how.

    Attributes:
        models: folders or Hub ids.
        calibrations: calibration text of each model.
        alpha: factor of the off-diagonals; 1 is least squares, 0 a weighted average.
        dtype: dtype of the merged model.
    """

    models: tuple[str, ...]
    calibrations: tuple[str, ...]
    samples: int
    sequence_length: int
    seed: int = 0
    alpha: float = 0.9
    device: str = "cpu"
    dtype: str = "float32"

    def save(self, path: Path) -> None:
        """Write it for the program."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def merged_weight(weights: Sequence[Tensor], grams: Sequence[Tensor], alpha: float) -> Tensor:
    """The closed form for one layer.

    Args:
        weights: `[out_features, in_features]`, one per model.
        grams: Gram matrices `[in_features, in_features]` of each model's own inputs.
        alpha: factor of the off-diagonals.

    Returns:
        fp64 `[out_features, in_features]`; with a single model, its weight as it is.
    """
    average = torch.stack([weight.double() for weight in weights]).mean(0)
    scaled = [_with_scaled_off_diagonals(gram.double(), alpha) for gram in grams]
    total = torch.stack(scaled).sum(0)
    total.diagonal().add_(_RIDGE * total.diagonal().mean().clamp_min(torch.finfo().tiny))
    # As a step from the average, so that what all models agree on stays as it is.
    steps = [
        gram @ (weight.double() - average).mT for gram, weight in zip(scaled, weights, strict=True)
    ]
    step: Tensor = torch.linalg.solve(total, torch.stack(steps).sum(0))
    return average + step.mT


def linears(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers by name, but for one that is tied to an embedding."""
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in embedded
    }


def input_grams(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """`X^T X` of every linear layer's input, in fp64, over all positions of `tokens`."""
    grams: dict[str, Tensor] = {}

    def added_to(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            gram = (x.mT @ x).double()
            grams[name] = grams[name] + gram if name in grams else gram

        return add

    with ExitStack() as hooks, torch.inference_mode():
        for name, module in linears(model).items():
            handle = module.register_forward_pre_hook(added_to(name))
            hooks.callback(handle.remove)
        for batch in torch.split(tokens.to(model.device), _BATCH):
            model(input_ids=batch, use_cache=False)
    return grams


def merge(models: Sequence[PreTrainedModel], tokens: Sequence[Tensor], alpha: float) -> None:
    """Merge models into the first one.

    Args:
        tokens: int64 `[sequences, sequence_length]` of each model's own text.
    """
    grams = [input_grams(*each) for each in zip(models, tokens, strict=True)]
    layers = [linears(model) for model in models]
    parameters = [dict(model.named_parameters()) for model in models]
    with torch.no_grad():
        solved = {
            name: merged_weight(
                [_rows_out(own[name]) for own in layers], [own[name] for own in grams], alpha
            )
            for name in layers[0]
            if all(name in own for own in grams)  # experts that no token reached are averaged
        }
        for name, parameter in parameters[0].items():
            parameter.copy_(torch.stack([own[name].double() for own in parameters]).mean(0))
        for name, weight in solved.items():
            _rows_out(layers[0][name]).copy_(weight)


def run(job: Job, out: Path) -> None:
    """Load, merge and save; the result has the first model's configuration and tokenizer."""
    loaded = [_load(name, job) for name in job.models]
    tokens = [
        load_calibration(
            text,
            model=name,
            tokenizer=AutoTokenizer.from_pretrained(name),
            samples=job.samples,
            sequence_length=job.sequence_length,
            vocab_size=model.config.get_text_config().vocab_size,
            seed=job.seed,
        ).tokens
        for name, text, model in zip(job.models, job.calibrations, loaded, strict=True)
    ]
    merge(loaded, tokens, job.alpha)
    nn.Module.to(loaded[0], getattr(torch, job.dtype))
    loaded[0].save_pretrained(out)
    AutoTokenizer.from_pretrained(job.models[0]).save_pretrained(out)


def _with_scaled_off_diagonals(gram: Tensor, alpha: float) -> Tensor:
    return alpha * gram + (1 - alpha) * torch.diag(gram.diagonal())


def _rows_out(layer: nn.Linear | Conv1D) -> Tensor:
    """A view of the weight as `[out_features, in_features]`; Conv1D stores it transposed."""
    weight: Tensor = layer.weight
    return weight.mT if isinstance(layer, Conv1D) else weight


def _load(name: str, job: Job) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    nn.Module.to(model.eval(), job.device)  # in place; transformers' own is untyped
    return model


def main() -> None:
    """Merge as the job file of the command line says."""
    job: Mapping[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    run(Job(**job), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
