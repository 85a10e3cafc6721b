"""`--fail-if`: its form, what it may name, and when it holds."""

import pytest
import torch

from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.conditions import Condition
from mergekit_dam.evaluation.evaluation import Evaluation
from mergekit_dam.evaluation.settings import EvaluationSettings


def _losses(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


RESULT = Evaluation(
    settings=EvaluationSettings(),
    models=("good", "bad"),
    texts={"german": "g.jsonl", "math 2": "m.jsonl"},
    each={
        "good": {"german": _losses([2.0, 2.2]), "math 2": _losses([1.0, 1.0])},
        "bad": {"german": _losses([3.0, 3.2]), "math 2": _losses([1.0, 1.0])},
        "average": {"german": _losses([3.1, 3.1]), "math 2": _losses([2.0, 2.0])},
        "own": {"german": _losses([1.1, 1.1])},
    },
    baseline="average",
    references={"german": "own"},
)


@pytest.mark.parametrize(
    ("text", "failing"),
    [
        ("german > 3.05", ["bad"]),
        ("german>=2.1", ["good", "bad"]),
        ("german < 2", []),
        ("math 2 > 1e0", []),
        ("mean > 2", ["bad"]),
        ("perplexity german > 20", ["bad"]),
        ("difference german > -0.5", ["bad"]),
        ("recovery german <= 0.4", ["bad"]),
        ("recovery mean < 0.8", ["good", "bad"]),
    ],
)
def test_a_condition_holds_for_the_models_that_have_such_a_number(
    text: str, failing: list[str]
) -> None:
    condition = Condition.parse(text)
    condition.check(RESULT.texts, RESULT.references, compared=True)
    assert [said.split(":")[0] for said in condition.failures(RESULT)] == failing


def test_a_failure_says_the_number_and_the_condition() -> None:
    (said,) = Condition.parse("german > 3").failures(RESULT)
    assert said == "bad: loss german is 3.1 (german > 3)"


@pytest.mark.parametrize("text", ["german", "german = 3", "> 3", "german > much", "german > nan"])
def test_another_form_is_refused_with_examples(text: str) -> None:
    with pytest.raises(DamError, match="required `TEXT > NUMBER`"):
        Condition.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("germna > 3", "there is no text 'germna'; did you mean `german`?"),
        ("x > 3", "known are german, mean"),
        ("difference german > 0", "required a --baseline"),
        ("recovery german < 1", "required a --reference"),
    ],
)
def test_a_condition_on_what_is_not_measured_is_refused(text: str, message: str) -> None:
    with pytest.raises(DamError, match=message.replace("?", r"\?")):
        Condition.parse(text).check(["german"], [], compared=False)
