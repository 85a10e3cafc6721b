"""A configuration file, read: problems of any kind in one error, in place of mergekit's own.

mergekit's commands parse the YAML before this package is asked. So their files are read here
first, and what is wrong with a dam configuration is said with the file's name.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from pydantic import ValidationError

from mergekit_dam.errors import ConfigError, first_line, inside
from mergekit_dam.parameters import NAME
from mergekit_dam.request.document import Document, decoded, parse, single
from mergekit_dam.request.early import check_inputs
from mergekit_dam.request.keys import unknown_keys

_METHOD = re.compile(rb"[\"']?merge_method[\"']?\s*:\s*[\"']?([\w.-]+)")
_PARAMETER = (
    "required a number, a text, true or false, a list of these, or a list of filters "
    "(`- {filter: mlp, value: 0.5}`)"
)


def read_configuration(file: Path) -> tuple[MergeConfiguration, Document]:
    """Read a file with one dam configuration.

    Raises:
        ConfigError: With every problem that can be found without the models.
    """
    content = _content(file)
    with inside(str(file)):
        document = single(decoded(content))
        return validated(document), document


def tree_of_any_method(file: Path) -> dict[str, Any]:
    """The plain values of a configuration file, whatever its method is; their form is right.

    Raises:
        ConfigError: The file cannot be read, or mergekit would refuse it.
    """
    content = _content(file)
    with inside(str(file)):
        document = single(decoded(content))
        if isinstance(document.tree, Mapping):
            as_dam = {**document.tree, "merge_method": NAME}
            validated(replace(document, tree=as_dam))
        else:
            validated(document)
        return dict(document.tree)


def refuse_unreadable(file: Path, *, several: bool) -> None:
    """Refuse a file for a command of mergekit in which a dam configuration is wrong.

    Configurations of other methods are mergekit's business, wrong ones too.

    Args:
        several: Whether the command takes several documents, as mergekit-multi does.

    Raises:
        ConfigError: With the name of the file.
    """
    if file.exists() and not file.is_file():
        return  # a pipe can be read only once, and mergekit will
    content = _content(file)
    with inside(str(file)):
        try:
            text = decoded(content)
            documents = parse(text)
        except ConfigError:
            methods = [name.decode().lower() for name in _METHOD.findall(_ascii(content))]
            if methods and NAME not in methods:
                return
            raise
        own = [d for d in documents if d.method is None or d.method.strip().lower() == NAME]
        if own and not several:
            own = [single(text)]
        for document in own:
            validated(document)


def validated(document: Document) -> MergeConfiguration:
    """Mergekit's configuration of a document.

    Raises:
        ConfigError: With every problem that mergekit would have with it.
    """
    tree = document.tree
    if not isinstance(tree, Mapping):
        got = "an empty document" if tree is None else f"a {_kind(tree)}"
        raise ConfigError(
            f"required a mapping with `merge_method: {NAME}`, `models` and so on, got {got}"
        )
    problems = [*_check_method(tree), *check_inputs(tree)]
    try:
        config: MergeConfiguration = MergeConfiguration.model_validate(tree)
    except ValidationError as error:
        problems += _explained(error, tree)
    except (RuntimeError, RecursionError) as error:
        # Of several kinds of inputs mergekit says the same.
        problems += [] if check_inputs(tree) else [first_line(error)]
    if problems:
        raise ConfigError(*problems, *unknown_keys(document))
    return config


def _check_method(tree: Mapping[Any, Any]) -> list[str]:
    if "merge_method" not in tree:
        return [f"the configuration names no `merge_method`; add `merge_method: {NAME}`"]
    method = tree["merge_method"]
    if method == NAME:
        return []
    if not isinstance(method, str):
        return []  # a wrong kind of value, as in any other place
    return [f"required `merge_method: {NAME}`, got `{method}`"]


def _explained(error: ValidationError, tree: Any) -> list[str]:
    """One problem for each value that pydantic refuses; it lists one for each type it tried."""
    found: dict[str, str] = {}
    for entry in error.errors():
        path, value = _followed(tree, entry["loc"])
        if "parameters" in path[:-1]:
            path = path[: path.index("parameters") + 2]
            value, message = _at(tree, path), _PARAMETER
        elif entry["type"] == "missing":
            message = f"required `{entry['loc'][-1]}`"
        else:
            message = entry["msg"][0].lower() + entry["msg"][1:]
        found.setdefault(_label(path), f"{message}, got {_shown(value)}")
    return [f"{label}: {message}" for label, message in found.items()]


def _followed(tree: Any, location: tuple[Any, ...]) -> tuple[list[Any], Any]:
    """The part of pydantic's location that is in the tree, without its names of types."""
    path = []
    for step in location:
        known = step in tree if isinstance(tree, Mapping) else _is_index(step, tree)
        if known:
            tree = tree[step]
        else:
            break
        path.append(step)
    return path, tree


def _is_index(step: Any, tree: Any) -> bool:
    return isinstance(tree, list) and isinstance(step, int) and step < len(tree)


def _at(tree: Any, path: list[Any]) -> Any:
    for step in path:
        tree = tree[step]
    return tree


def _label(path: list[Any]) -> str:
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".") or "the configuration"


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{_kind(value)} {text}" if len(text) <= 60 else f"a {_kind(value)}"


def _kind(value: Any) -> str:
    names = {list: "list", dict: "mapping", str: "text", bool: "truth value", type(None): "empty"}
    return names.get(type(value), type(value).__name__)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror or error})") from error


def _ascii(content: bytes) -> bytes:
    """UTF-16 text without its zero bytes, in which the name of the method can be found."""
    return content.replace(b"\0", b"")
