"""What a merge says at its start and at its end: about five lines each."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from mergekit_dam.coefficients.file import REPORT_NAME
from mergekit_dam.host.prepare import Prepared
from mergekit_dam.lock.schema import LOCK_NAME
from mergekit_dam.reports.names import short_names
from mergekit_dam.reports.page import PAGE_NAME
from mergekit_dam.reports.schema import DamReport, read
from mergekit_dam.reports.summary import summary_of
from mergekit_dam.stored import folder_bytes
from mergekit_dam.tables import size


def beginning(prepared: Prepared, output: Path, place: Path, *, lasting: bool) -> Iterator[str]:
    """What will be merged, from which text, and to where.

    Args:
        output: folder of the merged model.
        place: folder for what is kept meanwhile.
        lasting: whether the folder stays.
    """
    checked = prepared.checked
    every = dict.fromkeys([*checked.models, *([checked.base] if checked.base else [])])
    short = short_names([str(own) for own in every])
    models = ", ".join(short[str(own)] for own in checked.models if own != checked.base)
    yield f"dam merges {models}" + (f" onto {short[str(checked.base)]}" if checked.base else "")
    for (n, length), texts in _texts(prepared, short).items():
        held_out = prepared.run.held_out(n)
        yield f"text: {n} x {length} tokens each, {held_out} x held out: {', '.join(texts)}"
    if prepared.replay is not None:
        yield "coefficients are those of an earlier merge; nothing is fitted"
    if not lasting:
        return
    goes_on = ", from which the same command goes on if this is stopped"
    yield f"written to {output}; until all is done, files are in {place}" + (
        goes_on if prepared.calibration and prepared.run.resume else ""
    )


def _texts(prepared: Prepared, short: Mapping[str, str]) -> dict[tuple[int, int], list[str]]:
    """Shape of the calibration tokens -> the texts that have it, with their models."""
    found: dict[tuple[int, int], list[str]] = {}
    for model, own in prepared.calibration.items():
        n, length = own.tokens.shape
        source = prepared.names.text(own.provenance.source)
        found.setdefault((n, length), []).append(f"{source} for {short[str(model)]}")
    return found


def ending(output: Path, *, lasting: bool) -> Iterator[str]:
    """What came out, and where it is; commands can be pasted into a shell.

    Args:
        output: folder of the merged model, which is complete.
        lasting: whether the folder stays.
    """
    report = read(output / REPORT_NAME)
    yield from _judged(report)
    summary = summary_of(report)
    if report.replayed:
        yield f"{summary.tensors} tensors were merged with the coefficients of an earlier merge"
    else:
        why = "".join(f"; {count}: {reason}" for reason, count in summary.kept.items())
        yield f"{summary.learned} of {summary.tensors} tensors were learned{why}"
    if not lasting:
        return
    yield f"written to {output}: {size(folder_bytes(output))}; {PAGE_NAME} shows every fit"
    place, lock = (shlex.quote(str(path)) for path in (output, output / LOCK_NAME))
    judged = "--data NAME=TEXT --reference NAME=MODEL"
    yield f"evaluate:  mergekit-dam evaluate {place} {judged} ..."
    if (output / LOCK_NAME).is_file():
        yield f"reproduce: mergekit-dam reproduce {lock}"


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
