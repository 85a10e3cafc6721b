"""Colours of maps: steps from orange (below zero) over a pale grey to blue (above)."""

from collections.abc import Mapping, Sequence

STEPS = 8
"""Colours on either side of zero."""

LIGHT = {
    "n": ("#f9e3cb", "#efad66", "#cf741f", "#843a05"),
    "z": ("#f1f1ed",),
    "p": ("#dfebf5", "#8fbddf", "#3a83bf", "#083f7d"),
}
DARK = {
    "n": ("#433525", "#8a5d28", "#d8923f", "#ffdcab"),
    "z": ("#292e33",),
    "p": ("#23394e", "#2c6a9d", "#5aa7e0", "#c6e6ff"),
}


def css(stops: Mapping[str, Sequence[str]]) -> str:
    """The colours as CSS: `--n8` to `--n1`, `--z`, `--p1` to `--p8`."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours(stops).items())


def colours(stops: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Step -> colour."""
    found = {"z": stops["z"][0]}
    for side in ("n", "p"):
        for step in range(1, STEPS + 1):
            found[f"{side}{step}"] = _between(stops[side], (step - 1) / (STEPS - 1))
    return found


def fills(colour: dict[str, str] | None = None) -> str:
    """CSS rules that give the class of each step its colour, by variables or as it is."""
    return " ".join(
        f".{name}{{fill:{colour[name] if colour else f'var(--{name})'}}}" for name in colours(LIGHT)
    )


def _between(stops: Sequence[str], place: float) -> str:
    """The colour at a place between 0, the first stop, and 1, the last."""
    at = place * (len(stops) - 1)
    first = min(int(at), len(stops) - 2)
    pairs = zip(_channels(stops[first]), _channels(stops[first + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (at - first)):02x}" for a, b in pairs)


def _channels(colour: str) -> list[int]:
    return [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
