"""Everything that can be known before the first weight is read.

1. Check the configuration.
2. Replay: read the coefficients. Otherwise: load every model's tokenizer, see that they
   agree, and make every model's calibration tokens.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import PrivateAttr
from transformers import PreTrainedTokenizerBase

from mergekit_dam.calibration import (
    CalibrationSet,
    check_agreement,
    load_calibration,
    load_tokenizer,
)
from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.config import Checked, check_configuration
from mergekit_dam.definitions import check_architectures
from mergekit_dam.errors import CalibrationError, ConfigError
from mergekit_dam.method import RunParameters
from mergekit_dam.objective.settings import LogitsSettings
from mergekit_dam.settings import RunSettings


@dataclass(frozen=True)
class Prepared:
    """A checked configuration with the data of its fit, or the coefficients to replay.

    Attributes:
        calibration: per model whose data takes part in the fit; empty in a replay.
        replay: the coefficients to replay, or None.
        start: the coefficients to start from, or None.
    """

    checked: Checked
    settings: RunSettings
    calibration: Mapping[ModelReference, CalibrationSet]
    replay: CoefficientFile | None
    start: CoefficientFile | None = None


class PreparedConfiguration(MergeConfiguration):
    """mergekit's configuration, carrying what was prepared for it to the planner."""

    _prepared: Prepared = PrivateAttr()

    @classmethod
    def create(cls, config: MergeConfiguration, prepared: Prepared) -> "PreparedConfiguration":
        """The same configuration with its preparation."""
        values = {name: getattr(config, name) for name in MergeConfiguration.model_fields}
        result = cls.model_construct(_fields_set=set(config.model_fields_set), **values)
        result._prepared = prepared
        return result

    @property
    def prepared(self) -> Prepared:
        """What was prepared."""
        return self._prepared

    def referenced_models(self) -> list[ModelReference]:
        """The base and the models in the order of the YAML.

        mergekit's own order is that of a set, and the first gives the merged model its
        configuration and tokenizer: without a base, it would be another one in every run.
        """
        checked = self._prepared.checked
        return list(dict.fromkeys([*([checked.base] if checked.base else []), *checked.models]))


def prepare(
    config: MergeConfiguration, options: MergeOptions, source: Mapping[str, Any] | None = None
) -> Prepared:
    """Check a configuration and make its calibration tokens.

    Args:
        source: the YAML as parsed, where it is at hand.

    Raises:
        ConfigError: the configuration is wrong; every problem is named.
        CalibrationError: a text cannot be used, or the models' tokenizers disagree.
    """
    asked = check(config, options, source)
    if asked.replay is not None:
        return asked
    checked, run = asked.checked, asked.checked.run
    models = checked.models
    if checked.base is not None and checked.base not in models:
        models = (*models, checked.base)
    giver = _vocabulary_giver(config, checked)
    if giver is not None and giver not in models:
        models = (*models, giver)
    tokenizers = {model: load_tokenizer(model, options.trust_remote_code) for model in models}
    check_agreement({str(model): tokenizer for model, tokenizer in tokenizers.items()})
    calibration = {}
    for model, text in checked.calibrations.items():
        calibration[model] = load_calibration(
            text,
            model=str(model),
            tokenizer=tokenizers[model],
            samples=run.samples,
            sequence_length=run.sequence_length,
            vocab_size=_vocab_size(model, options),
            seed=asked.settings.seed,
        )
    check_length(checked, options)
    if giver is not None:
        kept = set(tokenizers[giver].get_vocab().values())
        _check_vocabulary(calibration, tokenizers, kept, f"it gets the tokenizer of {giver}")
    elif options.unsafe_truncate_embeddings:
        rows = min(_vocab_size(model, options) for model in models)
        because = f"--unsafe-truncate-embeddings leaves {rows} ids"
        _check_vocabulary(calibration, tokenizers, set(range(rows)), because)
    return dataclasses.replace(asked, calibration=calibration)


def check(
    config: MergeConfiguration, options: MergeOptions, source: Mapping[str, Any] | None = None
) -> Prepared:
    """Everything that is known without reading text: a preparation with no calibration yet.

    Args:
        source: the YAML as parsed, where it is at hand.

    Raises:
        ConfigError: the configuration is wrong; every problem is named.
        ArchitectureError: a model is none that can be merged.
    """
    checked = check_configuration(config, source)
    check_architectures((*checked.models, *([checked.base] if checked.base else [])), options)
    run = checked.run
    settings = run_settings(run, run.seed if run.seed is not None else options.random_seed or 0)
    if run.coefficients is not None:
        return Prepared(checked, settings, {}, CoefficientFile.load(run.coefficients))
    if options.multi_gpu:
        raise ConfigError(
            [
                "--multi-gpu: a fit follows the data from one block to the next, on one device; "
                "leave the option out (in place of --gpu-rich: --cuda --low-cpu-memory "
                "--read-to-gpu). Coefficients that are known, as in a replay, can be merged so"
            ]
        )
    start = None
    if run.start not in ("average", "random"):
        if not Path(run.start).exists():
            raise ConfigError(
                [
                    f"start: required `average`, `random`, or the path of the coefficients of an "
                    f"earlier dam merge, got {run.start!r}, where there is no file"
                ]
            )
        start = CoefficientFile.load(run.start, parameter="start")
    return Prepared(checked, settings, {}, None, start)


def run_settings(run: RunParameters, seed: int) -> RunSettings:
    """What the parameters of the whole merge ask for."""
    names = [field.name for field in dataclasses.fields(LogitsSettings)]
    return RunSettings(
        holdout=run.holdout,
        objective=run.objective,
        metric=run.metric,
        logits=LogitsSettings(**{name: getattr(run, name) for name in names}),
        start=run.start,
        resident=run.resident,
        stream_offload=run.stream_offload,
        seed=seed,
    )


def _vocab_size(model: ModelReference, options: MergeOptions) -> int:
    config = model.config(trust_remote_code=options.trust_remote_code)
    size: int = config.get_text_config().vocab_size
    return size


def _vocabulary_giver(config: MergeConfiguration, checked: Checked) -> ModelReference | None:
    """The model whose tokenizer the merged model gets, if the configuration names one."""
    source = config.tokenizer.source if config.tokenizer is not None else config.tokenizer_source
    if source == "base":
        return checked.base or checked.models[0]
    return source if isinstance(source, ModelReference) else None


def _check_vocabulary(
    calibration: Mapping[ModelReference, CalibrationSet],
    tokenizers: Mapping[ModelReference, PreTrainedTokenizerBase],
    kept: set[int],
    because: str,
) -> None:
    """Refuse text with tokens that the merged model will not have."""
    for model, own in calibration.items():
        lost = sorted(set(own.tokens.flatten().tolist()) - kept)
        if lost:
            named = ", ".join(map(str, tokenizers[model].convert_ids_to_tokens(lost[:3])))
            raise CalibrationError(
                f"calibration of {model}: its text has {len(lost)} tokens ({named}"
                f"{' and others' if len(lost) > 3 else ''}) that the merged model will not have, "
                f"as {because}; write `tokenizer: {{source: union}}`, or leave out the text that "
                f"has them"
            )


def check_length(checked: Checked, options: MergeOptions) -> None:
    """Refuse sequences longer than a model has positions for.

    Raises:
        CalibrationError: naming the model.
    """
    for model in checked.calibrations:
        config = model.config(trust_remote_code=options.trust_remote_code).get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        if longest and checked.run.sequence_length > longest:
            raise CalibrationError(
                f"calibration of {model}: `sequence_length` is {checked.run.sequence_length}, but "
                f"the model has {longest} positions; set `sequence_length: {longest}` or less"
            )
