"""Reports of merges that never ran: `dam_report.json` as plain values, of any depth."""

import math
from collections.abc import Sequence
from typing import Any

MODULES = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)

SOURCES = ("org/python", "org/german", "org/math", "org/base")
"""Three models, and the base that takes the remainder."""


def wave(*numbers: float) -> float:
    """A number between -1 and 1 that looks random and is always the same."""
    return math.sin(sum((k + 1) * 12.9898 * number for k, number in enumerate(numbers)) * 78.233)


def coefficients(sources: Sequence[str], *place: float) -> dict[str, Any]:
    """Coefficients of a tensor that sum to one."""
    means = [1 / 3 + 0.3 * wave(k, *place) for k in range(len(sources) - 1)]
    means.append(1 - sum(means))
    return {
        source: {"mean": mean, "std": 0.2, "min": mean - 1.1, "max": mean + 1.3}
        for source, mean in zip(sources, means, strict=True)
    }


def tensor(sources: Sequence[str], layer: int, module: int) -> dict[str, Any]:
    """The entry of a tensor of a layer: a fitted linear with a correction, or an equal norm."""
    name = f"model.layers.{layer}.{MODULES[module]}.weight"
    if "norm" in name:
        rows = {
            source: {"mean": 1 / 3, "std": 0.0, "min": 1 / 3, "max": 1 / 3} for source in sources
        }
        outcome = "identical in all models"
        return {"name": name, "kind": "norm", "outcome": outcome, "coefficients": rows}
    start = 0.05 + 0.02 * wave(layer, module)
    return {
        "name": name,
        "kind": "linear",
        "outcome": "fitted",
        "loss_start": start,
        "loss_fitted": 0.6 * start,
        "held_out_start": 1.1 * start,
        "held_out_fitted": 0.8 * start,
        "solver": {"method": "cholesky"},
        "seconds": 0.5,
        "correction": {
            "outcome": "low rank",
            "rank": 64,
            "held_out": 0.7 * start,
            "held_out_start": 0.8 * start,
            "norm": 2 + wave(module, layer),
            "weight_norm": 40.0,
        },
        "coefficients": coefficients(sources, layer, module),
    }


def report_values(layers: int = 4, sources: Sequence[str] = SOURCES) -> dict[str, Any]:
    """The report of a search over a decoder of some depth."""
    models = sources[:-1]
    text = {
        "source": "/home/someone/data/words.jsonl",
        "dataset": None,
        "documents_read": 312,
        "documents_used": 10,
        "tokens_used": 16384,
        "sequences": 32,
        "sequence_length": 512,
        "cut": ["302 of 312 documents read were not needed"],
        "warnings": [],
    }
    return {
        "versions": {"mergekit-dam": "0.1.0", "torch": "2.13.0"},
        "parameters": {"samples": 32},
        "sources": list(sources),
        "base_model": sources[-1],
        "replayed": False,
        "calibration": {model: {**text, "model": model} for model in models},
        "held_out_tokens": dict.fromkeys(models, 2048),
        "search": [
            trial("start", True, [0.9, 1.3, 1.8]),
            trial("layer, sensitivity", True, [0.5, 0.6, 0.7]),
            trial("logits, 20 steps", False, [0.6, 0.6, 0.7]),
        ],
        "left_out": [],
        "seconds": {f"block {k + 1}/{layers}": 7.0 for k in range(layers)},
        "peak_memory_bytes": {"host": 988913664},
        "tensors": [
            outside(sources, "model.embed_tokens.weight", "embedding"),
            *(tensor(sources, k, m) for k in range(layers) for m in range(len(MODULES))),
            outside(sources, "lm_head.weight", "head"),
        ],
    }


def outside(sources: Sequence[str], name: str, kind: str) -> dict[str, Any]:
    """The entry of a fitted tensor of no layer."""
    own = coefficients(sources, len(name))
    return {"name": name, "kind": kind, "outcome": "fitted", "coefficients": own}


def trial(name: str, kept: bool, losses: Sequence[float]) -> dict[str, Any]:
    mean = sum(losses) / len(losses)
    return {
        "name": name,
        "kept": kept,
        "held_out_kl": list(losses),
        "mean_held_out_kl": mean,
        "seconds": 60.0,
        "details": {},
        "ended": "",
    }
