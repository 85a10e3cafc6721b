"""Tables of the parameters, for the README."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

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
    "model": "For one model; at top level, for all models",
    "tensor": "For the fit of a tensor; at top level or for a slice, with filters and gradients",
    "merge": "For the whole merge; once, at top level",
    "logits": "For the objective `logits` (and `layer+logits`); once, at top level",
}
"""Headings of the README's tables; the parameters of the whole merge are in two tables."""


@dataclass(frozen=True)
class ParameterHelp:
    """One row of the README's tables; `table` is a key of `HEADINGS`."""

    name: str
    table: str
    type: str
    default: str
    description: str


def fields() -> Iterator[tuple[type[Parameters], str, FieldInfo]]:
    """Yield every parameter as (class that declares it, name, field)."""
    for owner in SCOPES:
        for name, field in owner.model_fields.items():
            yield owner, name, field


OWNERS = {name: owner for owner, name, _ in fields()}
"""Name of every parameter -> the class that declares it."""


def kinds(field: FieldInfo) -> tuple[Any, ...]:
    """The types that values of a parameter may have; those of a union one by one."""
    return (field.annotation, *get_args(field.annotation))


def is_number(field: FieldInfo) -> bool:
    """Whether values of a parameter are numbers."""
    return any(kind in (int, float, ByteSize) for kind in kinds(field))


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
            "| parameter | type | default | what it does, and when to change it |",
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
    """Name of a type for users: `str` for `str | None`, a Literal's values, `size` for bytes."""
    if ByteSize in getattr(annotation, "__args__", ()):
        return "size"
    arguments = [a for a in getattr(annotation, "__args__", ()) if a is not type(None)]
    if arguments and all(isinstance(a, str) for a in arguments):
        return " or ".join(f"`{a}`" for a in arguments)
    return str((arguments[0] if arguments else annotation).__name__)


if __name__ == "__main__":
    print(parameter_tables())
