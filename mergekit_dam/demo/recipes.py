"""The YAML files of the demo's merges."""

from pathlib import Path

import yaml

from mergekit_dam.demo.settings import DemoSettings
from mergekit_dam.demo.texts import DOMAINS

METHODS = ("linear", "task_arithmetic", "ties", "dam")

_HEAD = "# Paths start at the folder that `mergekit-dam demo` was run in.\n"
_FITS_ALONE = (
    "# Without `objective: layer`, gradient descent on the whole model would follow: minutes, for\n"
    "# models that were trained for less than one.\n"
)
# The best of a sweep over weights and densities, chosen on the test text itself. This favours
# these methods over `dam`, which never sees that text. Task arithmetic at a third is the average.
_STOCK_PARAMETERS: dict[str, dict[str, object]] = {
    "linear": {"weight": 1.0},
    "task_arithmetic": {"weight": 0.3},
    "ties": {"weight": 0.3, "density": 1.0, "normalize": False},
}


def recipe(method: str, directory: Path, settings: DemoSettings) -> str:
    """The configuration of one merge as text; `directory` is the demo's folder."""
    models = [{"model": _named(directory / domain)} for domain in DOMAINS]
    config: dict[str, object] = {"merge_method": method}
    if method != "linear":
        config["base_model"] = _named(directory / "base")
    if method == "dam":
        config["models"] = [
            {
                **model,
                "parameters": {"calibration": _named(text_path(directory, domain, "calibration"))},
            }
            for model, domain in zip(models, DOMAINS, strict=True)
        ]
        config["parameters"] = {
            "objective": "layer",
            "samples": settings.calibration_samples,
            "sequence_length": settings.sequence_length,
        }
    else:
        config["models"] = models
        config["parameters"] = _STOCK_PARAMETERS[method]
    config["dtype"] = "float32"
    head = _HEAD + _FITS_ALONE if method == "dam" else _HEAD
    return head + yaml.safe_dump(config, sort_keys=False)


def text_path(directory: Path, domain: str, part: str) -> Path:
    """Path of the text of a domain; `part` is "calibration" or "test"."""
    return directory / "data" / f"{domain}.{part}.jsonl"


def _named(path: Path) -> str:
    """A path for the YAML; mergekit may look up `a/b` on the Hub, but never `./a/b`."""
    return path.as_posix() if path.is_absolute() else f"./{path.as_posix()}"
