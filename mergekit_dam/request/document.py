"""The YAML text of a configuration, parsed: every key stands once, and nothing is out of bounds.

mergekit takes the last of two equal keys, expands any alias, and ends in a traceback where text is
no YAML. Here each is a problem with its line.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import yaml

from mergekit_dam.errors import ConfigError, first_line

DEEPEST = 50
"""Levels of nesting; a configuration has about ten."""

MOST_VALUES = 1_000_000
"""Values of a document after its aliases are expanded."""


@dataclass(frozen=True)
class Document:
    """One YAML document.

    Attributes:
        tree: Its plain values.
        anchored: Keys of the top level that have an anchor (`&name`) in their value, for use
            elsewhere.
    """

    tree: Any
    anchored: frozenset[Hashable] = frozenset()

    @property
    def method(self) -> str | None:
        """The merge method that it names; None if it names none."""
        named = self.tree.get("merge_method") if isinstance(self.tree, dict) else None
        return named if isinstance(named, str) else None


def decoded(content: bytes) -> str:
    """The text of a file.

    Raises:
        ConfigError: If it is not UTF-8; the message has the line.
    """
    if b"\0" in content:
        raise ConfigError("required UTF-8 text, got UTF-16 or binary data; save the file as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"line {line}: required UTF-8 text, got the byte 0x{content[error.start]:02X}, as in "
            f"Latin-1; save the file as UTF-8"
        ) from error


def parse(text: str) -> list[Document]:
    """The documents of a YAML text; an empty text has one, which is None.

    Raises:
        ConfigError: If it is no YAML, has a key twice, or is nested or expanded beyond bounds.
    """
    try:
        loader = _Loader(text)
        found = []
        while loader.check_node():
            node: yaml.Node = loader.get_node()  # type: ignore[assignment]  # check_node says so
            values = _Values()
            values.count(node)
            if values.repeated:
                raise ConfigError(*values.repeated)
            anchored = loader.anchored_keys(node)
            found.append(Document(loader.construct_document(node), anchored))
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_marked(error)) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"no readable YAML: {first_line(error)}") from error
    return found or [Document(None)]


def single(text: str) -> Document:
    """The only document of a YAML text.

    Raises:
        ConfigError: As in `parse`, and if there are several documents.
    """
    found = parse(text)
    if len(found) > 1:
        raise ConfigError(
            f"required one YAML document, got {len(found)}; run several merges of one file with "
            f"mergekit-multi"
        )
    return found[0]


class _Loader(yaml.SafeLoader):
    """yaml's SafeLoader, which limits the depth and remembers where anchors are."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._anchors: list[int] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self._depth += 1
        if self._depth > DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"required at most {DEEPEST} levels of nesting, got more",
                problem_mark=event.start_mark,
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and not isinstance(event, yaml.AliasEvent) and event.anchor:
            self._anchors.append(node.start_mark.index)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        # A number of 5000 digits, a date of a 13th month, a tag that its value does not fit.
        except (ValueError, OverflowError, LookupError, AttributeError, TypeError) as error:
            raise yaml.MarkedYAMLError(
                problem=f"{node.value!r:.40} is no value of the tag {node.tag.rpartition(':')[2]}",
                problem_mark=node.start_mark,
            ) from error

    def anchored_keys(self, node: yaml.Node) -> frozenset[Hashable]:
        """Keys of a mapping in whose value an anchor is written: there, not where it is used."""
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        return frozenset(
            key.value
            for key, value in pairs
            if isinstance(key, yaml.ScalarNode)
            and any(key.end_mark.index <= at <= value.end_mark.index for at in self._anchors)
        )


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [inner for pair in node.value for inner in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


class _Values:
    """Counts the values of a document with aliases expanded, and finds keys that stand twice."""

    def __init__(self) -> None:
        self.repeated: list[str] = []
        self._sizes: dict[yaml.Node, int | None] = {}

    def count(self, node: yaml.Node) -> int:
        """Number of values in a node.

        Raises:
            ConfigError: If they are too many, or an alias stands inside of what it refers to.
        """
        if node in self._sizes:
            size = self._sizes[node]
            if size is None:
                raise ConfigError(f"{_line(node)}: refers to itself; remove the alias inside of it")
            return size
        self._sizes[node] = None
        if isinstance(node, yaml.MappingNode):
            self._find_repeated(node)
        size = 1 + sum(map(self.count, _children(node)))
        if size > MOST_VALUES:
            raise ConfigError(
                f"{_line(node)}: required at most {MOST_VALUES:,} values, got more by expanding "
                f"aliases; write out what is meant"
            )
        self._sizes[node] = size
        return size

    def _find_repeated(self, node: yaml.MappingNode) -> None:
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            before = first.setdefault((key.tag, key.value), key)
            if before is not key:
                self.repeated.append(
                    f"{_line(key)}: `{key.value}` stands in line "
                    f"{before.start_mark.line + 1} already, and one of them would be dropped; "
                    f"keep one"
                )


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _marked(error: yaml.MarkedYAMLError) -> str:
    """The problem with a place of the text, and what to do about it."""
    mark = error.problem_mark or error.context_mark
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    problem = error.problem or error.context or "no YAML"
    if "\\t" in problem:
        remedy = "indent with spaces, not with tabs"
    elif "tag" in problem:
        remedy = "a configuration has plain values; remove the tag"
    else:
        remedy = (
            "mend the line or the one before it: entries of one list begin in one column, and a "
            "value with `: `, ` #` or one of `@ * & ! % { [` at its beginning needs quotes"
        )
    return f"{where}{problem}; {remedy}"
