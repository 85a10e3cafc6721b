"""Short names of models and modules, and the place of a tensor in the model."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

_IN_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<module>.+)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_LONGEST = 20


@dataclass(frozen=True)
class Place:
    """A tensor's place in a stack of layers, such as `model.layers`, layer 3, `mlp.up_proj`."""

    stack: str
    layer: int
    module: str


def place_of(name: str) -> Place | None:
    """The place of a tensor, or None if its name has no number; experts are told apart no more."""
    found = _IN_LAYER.fullmatch(name)
    if found is None:
        return None
    module = _NUMBER.sub("*", found["module"]).removesuffix(".weight")
    return Place(found["stack"], int(found["layer"]), module)


def short_names(sources: Sequence[str]) -> dict[str, str]:
    """Source -> the end of its path, as long as is needed to tell it from the others."""
    parts = {source: _parts(source) for source in sources}
    found: dict[str, str] = {}
    for source, own in parts.items():
        count = 1
        while count < len(own) and _taken(own, count, parts, source):
            count += 1
        found[source] = "/".join(own[-count:])
    return found


def _parts(source: str) -> list[str]:
    """The parts of a path; an adapter's own path follows that of its model after a `+`."""
    path = "+".join(PurePath(part).name for part in source.split("+")) if "+" in source else source
    return [part for part in path.replace("\\", "/").split("/") if part] or [source]


def _taken(own: list[str], count: int, parts: dict[str, list[str]], source: str) -> bool:
    return any(own[-count:] == other[-count:] for name, other in parts.items() if name != source)


def module_labels(modules: Sequence[str]) -> dict[str, str]:
    """Module -> a label that fits beside a picture."""
    last = Counter(module.rsplit(".", 1)[-1] for module in modules)
    labels = {}
    for module in modules:
        end = module.rsplit(".", 1)[-1]
        label = end if last[end] == 1 else module
        label = label.replace("layernorm", "norm").replace("attention", "attn")
        labels[module] = label if len(label) <= _LONGEST else f"…{label[1 - _LONGEST :]}"
    return labels


def ranges(numbers: Sequence[int]) -> str:
    """Numbers in ascending order, such as `0-3, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in runs)  # noqa: RUF001 (en dash)
