"""What a merge says at its start and at its end: about five lines each."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mergekit_dam.coefficients.file import REPORT_NAME
from mergekit_dam.errors import listed
from mergekit_dam.host.prepare import Prepared
from mergekit_dam.lock.schema import LOCK_NAME
from mergekit_dam.report.names import short_names
from mergekit_dam.report.schema import DamReport, read
from mergekit_dam.report.summary import summary_of
from mergekit_dam.stored import folder_bytes
from mergekit_dam.tables import size


def beginning(prepared: Prepared, output: Path, place: Path) -> Iterator[str]:
    """What will be merged, from which text, and to where.

    Args:
        output: folder of the merged model.
        place: folder for what is kept meanwhile.
    """
    checked = prepared.checked
    every = [str(own) for own in (*checked.models, *([checked.base] if checked.base else []))]
    short = short_names(list(dict.fromkeys(every)))
    models = listed([short[str(own)] for own in checked.models if own != checked.base])
    base = f", base {short[str(checked.base)]}" if checked.base else ""
    yield f"dam: {models}{base}"
    if prepared.calibration:
        shapes = Counter(tuple(own.tokens.shape) for own in prepared.calibration.values())
        of = "; ".join(
            f"{count} x {n} sequences of {length} tokens, {prepared.run.held_out(n)} held out"
            for (n, length), count in shapes.items()
        )
        yield f"text: {of}"
    elif prepared.replay is not None:
        yield "coefficients of an earlier merge: nothing is fitted"
    yield f"merged model: {output}; until it is complete, files are in {place}"


def ending(output: Path) -> Iterator[str]:
    """What came out.

    Args:
        output: folder of the merged model, which is complete.
    """
    report = read(output / REPORT_NAME)
    yield from _judged(report)
    summary = summary_of(report)
    why = "; ".join(f"{count} because {reason}" for reason, count in summary.kept.items())
    average = summary.tensors - summary.learned
    yield f"{summary.learned} of {summary.tensors} tensors were learned" + (
        f"; {average} were not: {why}" if average else ""
    )
    yield f"written to {output}: {size(folder_bytes(output))}; {REPORT_NAME} has every fit"
    yield f"evaluate:  mergekit-dam evaluate {output}"
    if (output / LOCK_NAME).is_file():
        yield f"reproduce: mergekit-dam reproduce {output / LOCK_NAME}"


def _judged(report: DamReport) -> Iterator[str]:
    domains = summary_of(report).domains
    if not domains:
        return
    own = ", ".join(
        f"{report.names.get(domain.model, domain.model)} "
        f"{_number(domain.before)} -> {_number(domain.after)}"
        for domain in domains
    )
    yield f"held-out KL from each model on its text, nats per token, average -> merged: {own}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
