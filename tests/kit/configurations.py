"""YAML of dam merges, and the problems that the check of a configuration finds."""

from textwrap import dedent, indent

import pytest
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_dam.errors import ConfigError
from mergekit_dam.request.check import Checked, check_configuration
from mergekit_dam.request.document import single

MODELS = """
- model: org/a
  parameters: {calibration: a.jsonl}
- model: org/b
  parameters: {calibration: b.jsonl}
"""


def configuration(
    *, models: str = MODELS, parameters: str = "", base: str | None = None, more: str = ""
) -> str:
    """The YAML of a dam merge."""
    parts = ["merge_method: dam", more.strip()]
    if models:
        parts.append(f"models:\n{indent(dedent(models).strip(), '  ')}")
    if parameters:
        parts.append(f"parameters: {parameters}")
    if base:
        parts.append(f"base_model: {base}")
    return "\n".join(part for part in parts if part)


def sliced(slices: str, *, parameters: str = "", base: str | None = None) -> str:
    more = f"slices:\n{indent(dedent(slices).strip(), '  ')}"
    return configuration(models="", parameters=parameters, base=base, more=more)


def module(more: str = "", models: str = MODELS) -> str:
    """The models as those of a module, which takes `more` keys."""
    lines = f"{more}\nmodels:\n{indent(models.strip(), '  ')}".strip()
    return f"modules:\n  default:\n{indent(lines, '    ')}"


def check(text: str) -> Checked:
    document = single(text)
    return check_configuration(MergeConfiguration.model_validate(document.tree), document)


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        check(text)
    return caught.value.problems


def only_problem(text: str) -> str:
    (problem,) = problems(text)
    return problem


def model(parameters: str) -> str:
    """Two models, the first with these parameters."""
    return f"""
    - model: org/a
      parameters: {parameters}
    - model: org/b
      parameters: {{calibration: b.jsonl}}
    """


def refs(*names: str) -> tuple[ModelReference, ...]:
    return tuple(ModelReference.model_validate(name) for name in names)
