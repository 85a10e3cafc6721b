"""The phases of a merge, with the work of each step.

The work is what decides for the time that is left: passes over the weights for every token. The
estimate of `mergekit-dam plan` counts far more; here, phases need only be right in proportion.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergekit_dam.host.prepare import Prepared
from mergekit_dam.layers import head, head_correction, head_loss
from mergekit_dam.parameters import RunParameters
from mergekit_dam.search.descend import phase_name as descent_name
from mergekit_dam.search.descents import ENOUGH, descents
from mergekit_dam.search.pace import judged_steps
from mergekit_dam.search.search import phase_name
from mergekit_dam.search.sensitivity import gradient_sequences
from mergekit_dam.sources.stage import Stage
from mergekit_dam.streams.progress import Phase

PASS, BACKWARD = 2.0, 6.0
"""Flops of a weight for a token that passes, and for one that passes and comes back."""

FIT, WITH_METRICS = 12.0, 20.0
"""Flops of a weight of a block for a token that it is fitted to: the passes of teacher and merged
model, moments, corrections and judgements; and with metrics for the errors."""

LOGITS = 1.5
"""Work on logits, relative to the products that make them: softmax passes over them."""

FITS, WRITING, CHECK = "layer fits", "write", "check"
"""Names of phases that are begun here."""

ELEMENT = 15.0
"""Flops in which as much time passes as in an element-wise operation on a weight."""

WRITE = 40.0
"""Flops in which as much time passes as in reading, merging and writing a weight of one source."""


@dataclass(frozen=True)
class Tokens:
    """Numbers of tokens.

    Attributes:
        all: of all models, those that are held out included.
        judging: those that judge a merged model.
        measuring: those that give metrics.
        sequence: one sequence of every model.
        texts: models with text.
        longest: the longest sequence.
    """

    all: int
    judging: int
    measuring: int
    sequence: int
    texts: int
    longest: int

    @classmethod
    def of(cls, prepared: Prepared) -> "Tokens":
        """The tokens of a merge."""
        run, shapes = prepared.run, [own.tokens.shape for own in prepared.calibration.values()]
        measuring = [gradient_sequences(n - run.held_out(n), m) * m for n, m in shapes]
        return cls(
            sum(n * m for n, m in shapes),
            sum((run.held_out(n) or n) * m for n, m in shapes),
            sum(measuring),
            sum(m for _, m in shapes),
            len(shapes),
            max(m for _, m in shapes),
        )


def one_sweep_phases(
    stages: Sequence[Stage], shapes: Mapping[str, Sequence[int]], prepared: Prepared
) -> list[Phase]:
    """The phases of a single sweep of layer fits, which writes as it goes."""
    tokens = Tokens.of(prepared)
    return [Phase(FITS, _fits(stages, shapes, tokens, FIT), "part", tokens.all), *written()]


def search_phases(
    stages: Sequence[Stage], shapes: Mapping[str, Sequence[int]], prepared: Prepared
) -> list[Phase]:
    """The phases of a search, and of the sweep that writes."""
    run, tokens = prepared.run, Tokens.of(prepared)
    return [
        *_searching(stages, shapes, run, tokens),
        known_phase(
            [shapes.get(own.name, ()) for s in stages for own in s.tensors], _sources(stages)
        ),
        *written(),
    ]


def known_phase(shapes: Sequence[Sequence[int]], sources: int) -> Phase:
    """The phase that merges and writes tensors whose coefficients are known."""
    return Phase(WRITING, tuple(WRITE * sources * math.prod(shape) for shape in shapes), "tensor")


def written() -> list[Phase]:
    """The last phase: files are checked, and their digests taken."""
    return [Phase(CHECK, (1.0,), "step")]


def _searching(
    stages: Sequence[Stage],
    shapes: Mapping[str, Sequence[int]],
    run: RunParameters,
    tokens: Tokens,
) -> Iterator[Phase]:
    weights = [_weights(stage, shapes) for stage in stages]
    blocks = weights[1:-1]
    layers, measures = run.objective != "logits", run.metric == "sensitivity"
    first = tokens.judging + (tokens.measuring if layers and measures else 0)
    first += 0 if layers else tokens.all
    passes = (0.0, *(PASS * own * first for own in blocks))
    yield Phase("survey", passes, "part", first)
    if layers:
        if measures:
            back = tuple(BACKWARD * own * tokens.measuring for own in reversed(blocks))
            yield Phase("backward", back, "block", tokens.measuring)
        verdict = PASS * LOGITS * 2 * tokens.judging * weights[-1]  # on teachers and merged model
        for metrics in (True, False) if measures else (False,):
            each = _fits(stages, shapes, tokens, WITH_METRICS if metrics else FIT)
            # Behind the first sweep, the start is judged, too.
            each = (*each[:-1], each[-1] + (2 if metrics == measures else 1) * verdict)
            condition = "" if metrics == measures else "if the fits before are no good"
            name = phase_name("sensitivity" if metrics else "identity")
            yield Phase(name, each, "part", tokens.all, condition)
    if run.objective == "layer":
        return
    for number, steps in enumerate(descents(run.steps)):
        step = BACKWARD * run.batch_size * run.gradient_accumulation * tokens.sequence
        looks = PASS * tokens.judging * len(judged_steps(steps)) / steps
        condition = "if the one before pays" if number else ""
        if not number and layers and run.steps is None:
            condition = f"if {ENOUGH:.0%} of the KL is left"
        yield Phase(
            descent_name(steps),
            ((step + looks) * sum(weights[1:]),) * steps,
            "step",
            run.batch_size * run.gradient_accumulation * tokens.sequence,
            condition,
        )


def _fits(
    stages: Sequence[Stage], shapes: Mapping[str, Sequence[int]], tokens: Tokens, each: float
) -> tuple[float, ...]:
    """Work of the fit of every stage."""
    blocks = [each * tokens.all * _weights(stage, shapes) for stage in stages[1:-1]]
    gathered = PASS * tokens.all * stages[0].models.output.config.get_text_config().hidden_size
    return (gathered, *blocks, _head(stages[-1], shapes, tokens))


def _head(stage: Stage, shapes: Mapping[str, Sequence[int]], tokens: Tokens) -> float:
    """Work of the descents of the head; none where it is not fitted."""
    own = [t for t in stage.tensors if t.tied_to is None and t.settings.fits("head")]
    if not own:
        return 0.0
    corrected, sources = own[0].settings.correction != "none", len(stage.models.sources)
    descents = [head.column_steps(corrected), *([head_correction.STEPS] if corrected else [])]
    each = tokens.all // tokens.texts
    steps = sum(head_loss.steps_for(most, each, tokens.longest) for most in descents)
    looks = head_loss.LOOKS * len(descents) + 1
    seen = 2 * PASS * looks * tokens.judging
    moved = (PASS + BACKWARD) * steps * tokens.texts * min(head_loss.TOKENS, tokens.longest)
    again = ELEMENT * steps * 2 * (sources + tokens.texts)
    weights = sum(math.prod(shapes.get(tensor.name, ())) for tensor in own)
    return weights * (LOGITS * (seen + moved) + again)


def _weights(stage: Stage, shapes: Mapping[str, Sequence[int]]) -> int:
    return sum(math.prod(shapes.get(own.name, ())) for own in stage.all_tensors)


def _sources(stages: Sequence[Stage]) -> int:
    return len(stages[0].models.sources)
