"""Texts that a user types, of any content."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_dam.calibration.entries import as_value
from mergekit_dam.calibration.mixture import problems_of
from mergekit_dam.calibration.source import OPTIONS, CalibrationSource
from mergekit_dam.evaluation.conditions import QUANTITIES, Condition
from mergekit_dam.evaluation.named import named_texts, split_name
from mergekit_dam.model.named import require_model
from tests.kit.damage import NAMES, changed, values
from tests.kit.guard import guarded

pytestmark = pytest.mark.slow

OPTION_VALUES = st.sampled_from(
    [
        *("", "1", "0", "-1", "0.5", "nan", "inf", "1" * 5000, "1_0", "0x1", "\u0663"),
        *("alpaca", "none", "train", *NAMES),
    ]
)
SOURCES = st.tuples(
    st.sampled_from(["self", "org/a", "org/a@v1", "a.jsonl", ".", "~nobody", "", "C:\\x"])
    | st.text(max_size=8),
    st.lists(
        st.tuples(st.sampled_from([*OPTIONS, "", "x"]), OPTION_VALUES | st.text(max_size=6)),
        max_size=4,
    ),
).map(lambda own: own[0] + "".join(f":{key}={value}" for key, value in own[1]))


@given(text=SOURCES | st.text(max_size=30))
def test_a_source_of_text(text: str) -> None:
    with guarded():
        CalibrationSource.parse(text)


@given(texts=st.lists(SOURCES | st.text(max_size=10), max_size=3), samples=st.integers(0, 9))
def test_sources_of_texts(texts: list[str], samples: int) -> None:
    with guarded():
        problems_of(tuple(texts), samples)
    with guarded():
        named_texts([f"name={own}" for own in texts] + texts)


ENTRY: dict[str, Any] = {
    "path": "org/chat",
    "type": "chat_template",
    "split": "train",
    "revision": "v1",
    "field_messages": "messages",
    "message_property_mappings": {"role": "role", "content": "content"},
    "roles_to_train": ["assistant"],
}


@given(entry=changed(ENTRY).filter(lambda own: isinstance(own, dict)))
def test_an_entry_of_another_program(entry: dict[str, Any]) -> None:
    with guarded():
        as_value(entry)


WORDS = st.sampled_from(
    [*QUANTITIES, ">", "<", ">=", "=", "mean", "3.1", "nan", "1e999", "-", "a b"]
)
LONG = st.sampled_from(
    [" " * 5000, ">" * 5000, "a" + " " * 5000 + ">", "a > " * 500, "recovery " * 500]
)


@given(text=st.lists(WORDS | st.text(max_size=5), max_size=6).map(" ".join) | LONG)
def test_a_condition(text: str) -> None:
    with guarded():
        condition = Condition.parse(text)
        assert Condition.parse(str(condition)) is not None
        condition.check(["a"], ["a"], compared=True)


@given(name=st.sampled_from(NAMES) | st.text(max_size=12))
def test_a_name_of_a_model(name: str) -> None:
    with guarded():
        split_name(name)
    with guarded():
        require_model(name)
    with guarded():
        require_model(f"{name}+{name}")


@given(value=values)
def test_a_value_of_calibration(value: Any) -> None:
    with guarded():
        problems_of((str(value),), 4)
