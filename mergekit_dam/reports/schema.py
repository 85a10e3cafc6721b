"""`dam_report.json` as typed data: the one place that knows the layout of the file."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from mergekit_dam.errors import DamError
from mergekit_dam.reports.names import short_names
from mergekit_dam.untrusted import parsed_json

FITTED = ("fitted", "fitted end to end")
"""Outcomes of tensors whose coefficients were learned."""

DROPPED = "start kept: held-out loss was not better"
"""Outcome of a tensor whose fit was dropped."""

LARGEST = 1e30


def _bounded(value: float) -> float:
    return max(-LARGEST, min(LARGEST, value))


Number = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_bounded)]
"""A number of which differences can be taken, and drawn: what is larger counts as `LARGEST`."""


class Section(BaseModel):
    """A part of the file; fields of later versions are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Spread(Section):
    """One source's coefficients of a tensor, over its input columns.

    Attributes:
        std: Standard deviation; None in reports of 0.1.0.
    """

    mean: Number
    min: Number
    max: Number
    std: Number | None = None


class Correction(Section):
    """What became of a tensor's correction.

    Attributes:
        outcome: "low rank", "full", or why it was dropped; empty if a descent alone made it.
        rank: Rank of the factors of the layer fit.
        descended_rank: Rank of the factors that a descent added.
        held_out_start: Held-out loss without it, in the unit of the tensor's losses.
        held_out: Held-out loss with it, if it was kept.
        norm: Frobenius norm of the whole correction.
        weight_norm: Frobenius norm of the weight as it was merged by the layer fit.
    """

    outcome: str = ""
    rank: int | None = None
    descended_rank: int | None = None
    held_out_start: Number | None = None
    held_out: Number | None = None
    norm: Number | None = None
    weight_norm: Number | None = None

    @property
    def whole_rank(self) -> int:
        """Rank of all its factors; 0 if it is a full matrix."""
        return 0 if self.outcome == "full" else (self.rank or 0) + (self.descended_rank or 0)

    @property
    def share(self) -> float | None:
        """Size of the correction as a fraction of that of the weight."""
        if self.norm is None or not self.weight_norm:
            return None
        return self.norm / self.weight_norm


class Tensor(Section):
    """The fit of one tensor.

    Attributes:
        outcome: "fitted", "fitted end to end", or why it keeps the average.
        loss_start, loss_fitted: Loss of the layer fit on its own text, before and after.
        held_out_start, held_out_fitted: The same on held-out text. Losses are fractions of the
            energy of the teachers' outputs (of the head: nats per token).
        experts: Reason -> experts of a fused tensor that keep the average.
    """

    name: str
    kind: str
    outcome: str
    loss_start: Number | None = None
    loss_fitted: Number | None = None
    held_out_start: Number | None = None
    held_out_fitted: Number | None = None
    experts: dict[str, list[int]] = {}
    correction: Correction | None = None
    coefficients: dict[str, Spread] = {}

    @property
    def learned(self) -> bool:
        """Whether its coefficients were learned."""
        return self.outcome in FITTED

    @property
    def held_out_before(self) -> float | None:
        """Held-out loss of the average, where it was measured."""
        return self.held_out_start

    @property
    def held_out_after(self) -> float | None:
        """Held-out loss of what the layer fit kept: fit or average, with a correction or without.

        A fit is kept if its loss is lower.
        """
        known = [self.held_out_start, self.held_out_fitted]
        if self.correction is not None:
            known.append(self.correction.held_out)
        return min((loss for loss in known if loss is not None), default=None)


class Trial(Section):
    """One step of a search; `held_out_kl` has an entry per model with text, in nats per token."""

    name: str
    kept: bool
    held_out_kl: tuple[Number | None, ...]
    mean_held_out_kl: Number | None
    seconds: Number = 0.0
    details: dict[str, Number] = {}
    ended: str = ""


class Text(Section):
    """A model's calibration text: how much of it there was, and what was cut; never its words."""

    source: str = ""
    dataset: str | None = None
    read_as: str = ""
    documents_read: int = 0
    documents_used: int = 0
    tokens_used: int = 0
    tokens_counted: int | None = None
    sequences: int = 0
    sequence_length: int = 0
    cut: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    synthetic: bool = False
    parts: tuple["Text", ...] = ()


class DamReport(Section):
    """A merge, as `dam_report.json` describes it.

    Attributes:
        sources: Names of the models, and of the base, in the order of the coefficients.
        base_model: Name of the base, if there is one.
        parameters: Parameters of the merge that differ from their defaults.
        replayed: Whether coefficients came from a file, and nothing was fitted.
        calibration: Model -> its text.
        held_out_tokens: Model -> tokens that judge the merge and took no part in the fit.
        text_losses: Model -> loss of the next token on its held-out text, in nats per token: its
            "own", and that of the "start"; empty if the whole model was not judged.
        search: Trials, if the whole model was judged.
        left_out: Sentences about what there was no time for.
        seconds: Stage of the last layer fit -> wall time.
        peak_memory_bytes: "host" or a GPU -> peak of the merge.
        corrections: Digest of `dam_corrections.safetensors`, if there is one.
    """

    sources: tuple[str, ...]
    base_model: str | None = None
    versions: dict[str, str] = {}
    parameters: dict[str, Any] = {}
    replayed: bool = False
    calibration: dict[str, Text] = {}
    held_out_tokens: dict[str, int] = {}
    text_losses: dict[str, dict[str, float | None]] = {}
    search: tuple[Trial, ...] = ()
    left_out: tuple[str, ...] = ()
    seconds: dict[str, Number] = {}
    peak_memory_bytes: dict[str, int] = {}
    corrections: str | None = None
    tensors: tuple[Tensor, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _with_this_run(cls, values: Any) -> Any:
        """The sections of `this_run`, which holds what differs from run to run, as if beside it."""
        if not isinstance(values, Mapping) or not isinstance(values.get("this_run"), Mapping):
            return values
        own = values["this_run"]
        timed = zip(values.get("search", ()), own.get("trial_seconds", ()), strict=False)
        search = [{**trial, "seconds": seconds} for trial, seconds in timed]
        return {**values, **own, **({"search": search} if search else {})}

    @model_validator(mode="after")
    def _is_of_its_sources(self) -> "DamReport":
        """Refuse numbers of models that are none of the sources: parts of two reports."""
        told = {*self.calibration, *self.held_out_tokens}
        told.update(*(tensor.coefficients for tensor in self.tensors))
        others = sorted(told - {*self.sources})
        if others:
            raise ValueError(f"{others[0]!r} is none of its sources")
        if len({len(trial.held_out_kl) for trial in self.search}) > 1:
            raise ValueError("its trials judge different numbers of models")
        return self

    @cached_property
    def names(self) -> dict[str, str]:
        """Model -> its short name."""
        return short_names(list(dict.fromkeys([*self.sources, *self.calibration])))

    def is_remainder(self, source: str) -> bool:
        """Whether a source is a base that takes the remainder, with no text of its own."""
        return source == self.base_model and source not in self.calibration

    @cached_property
    def copied(self) -> bool:
        """Whether every tensor is a copy of one model's."""
        return all(tensor.outcome.startswith("copied") for tensor in self.tensors)

    @property
    def start(self) -> Trial | None:
        """The model that the search started from, usually the average."""
        return self.search[0] if self.search else None

    @property
    def result(self) -> Trial | None:
        """The trial whose coefficients were written."""
        return next((trial for trial in reversed(self.search) if trial.kept), None)


def parse(values: Mapping[str, Any], place: str) -> DamReport:
    """A report from parsed JSON.

    Args:
        place: The file, for messages.

    Raises:
        DamError: It is not the report of a dam merge.
    """
    try:
        return DamReport.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DamError(
            f"{place}: required the report of a dam merge, got another file, or a damaged one "
            f"({where}: {first['msg']}); name the folder of a merge"
        ) from error


def read(path: Path) -> DamReport:
    """Read `dam_report.json`.

    Raises:
        DamError: There is no such file, or it is not the report of a dam merge.
    """
    try:
        values = parsed_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DamError(
            f"{path}: no such file; name the folder of a dam merge, which holds its report"
        ) from error
    except (OSError, ValueError) as error:
        raise DamError(
            f"{path}: required the report of a dam merge, got a file that cannot be read as JSON "
            f"({error}); name the folder of a merge"
        ) from error
    return parse(values, str(path))
