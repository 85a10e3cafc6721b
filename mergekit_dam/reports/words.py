"""Numbers as a person reads them."""

MINUS = "\u2212"


def number(value: float | None, digits: int = 3) -> str:
    """A number with about three digits; a dash where it is unknown."""
    if value is None:
        return "–"  # noqa: RUF001 (en dash)
    size = abs(value)
    if size and size < 10.0**-digits:
        shown = f"{value:.1e}"
    elif size >= 100:
        shown = f"{value:,.0f}"
    else:
        shown = f"{value:.{digits}f}" if size < 10 else f"{value:.1f}"
    return signed(shown)


def signed(shown: str) -> str:
    """A number with a true minus sign, and none before zero."""
    if shown.startswith("-"):
        return shown[1:] if not shown.strip("-0.") else MINUS + shown[1:]
    return shown


def fixed(value: float, digits: int = 2) -> str:
    """A number with so many decimals."""
    return signed(f"{value:.{digits}f}")


def percent_of(fraction: float | None) -> str:
    """A fraction in percent: two digits below 10 %, whole numbers from there."""
    if fraction is None:
        return "–"  # noqa: RUF001 (en dash)
    value = 100 * fraction
    return signed(f"{value:.0f} %" if abs(value) >= 9.95 or value == 0 else f"{value:.2g} %")


def size(count: float) -> str:
    """Bytes in units of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit in ("B", "kB") else f"{count:.1f} {unit}"


def plural(count: int, noun: str) -> str:
    """A number of things."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
