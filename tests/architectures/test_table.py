"""The cases and the README's table are complete."""

from typing import Any

from mergekit.architecture.json_definitions import NAME_TO_ARCH
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.architectures.case import Case
from tests.architectures.cases import CASES
from tests.architectures.table import LOST, written_table


def test_the_readme_has_no_others() -> None:
    written = {
        title.removesuffix(LOST)
        for line in written_table().splitlines()[2:]
        for cell in line.split("|")[2:4]
        for title in cell.strip().split(", ")
        if title
    }
    assert written - {case.title for case in CASES.values()} <= NAME_TO_ARCH.keys()


def test_every_architecture_that_mergekit_defines_is_a_case() -> None:
    """Those that transformers has no class for need code from the Hub; aliases share a class."""
    import transformers

    known = {name for name in NAME_TO_ARCH if hasattr(transformers, name)}
    assert known <= {architecture_of(case) for case in CASES.values()}


def architecture_of(case: Case) -> str:
    if case.kind is not None:
        return case.kind.__name__
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(case.config())]
    return str(kind.__name__)
