"""The parameters as tables, for the documents."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ByteSize
from pydantic.fields import FieldInfo

from mergekit_dam.parameters import (
    LogitsParameters,
    ModelParameters,
    Parameters,
    RunParameters,
    TensorParameters,
)

SCOPES: dict[type[Parameters], str] = {
    ModelParameters: "model",
    TensorParameters: "tensor",
    RunParameters: "merge",
}

HEADINGS = {
    "model": "Of a model; at top level, of all models",
    "tensor": "Of the fit of a tensor; at top level or for a slice, with filters and gradients",
    "merge": "Of the whole merge; once, at top level",
    "logits": "Of the objective `logits` (and `layer+logits`); once, at top level",
}
"""What the tables in the README hold, by scope; the parameters of the merge are in two tables."""


@dataclass(frozen=True)
class ParameterHelp:
    """One row of the README's tables; `table` is a key of `HEADINGS`."""

    name: str
    table: str
    type: str
    default: str
    description: str


def fields() -> Iterator[tuple[type[Parameters], str, FieldInfo]]:
    """Every parameter as (class it belongs to, name, field)."""
    for owner in SCOPES:
        for name, field in owner.model_fields.items():
            yield owner, name, field


def parameter_help() -> tuple[ParameterHelp, ...]:
    """The rows of the README's tables."""
    return tuple(
        ParameterHelp(
            name=name,
            table="logits" if name in LogitsParameters.model_fields else SCOPES[owner],
            type=_type_name(field.annotation),
            default="" if field.default is None else str(field.default).lower(),
            description=field.description or "",
        )
        for owner, name, field in fields()
    )


def parameter_tables() -> str:
    """The README's tables, in Markdown."""
    parts = []
    for table, heading in HEADINGS.items():
        lines = [
            f"**{heading}**",
            "",
            "| parameter | type | default | what it does, and when to touch it |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| `{row.name}` | {row.type} | {row.default} | {row.description} |"
            for row in parameter_help()
            if row.table == table
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _type_name(annotation: Any) -> str:
    """`str | None` as `str`, a Literal as its values, bytes as a size, else by its name."""
    if ByteSize in getattr(annotation, "__args__", ()):
        return "size"
    arguments = [a for a in getattr(annotation, "__args__", ()) if a is not type(None)]
    if arguments and all(isinstance(a, str) for a in arguments):
        return " or ".join(f"`{a}`" for a in arguments)
    return str((arguments[0] if arguments else annotation).__name__)
