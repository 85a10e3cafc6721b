"""Everything that can be known before the first weight is read.

1. Check the configuration.
2. Replay: read the coefficients. Otherwise: load every model's tokenizer, see that they
   agree, and make every model's calibration tokens.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import PrivateAttr

from mergekit_dam.calibration import (
    CalibrationSet,
    check_agreement,
    load_calibration,
    load_tokenizer,
)
from mergekit_dam.coefficients import CoefficientFile
from mergekit_dam.config import Checked, check_configuration
from mergekit_dam.errors import CalibrationError
from mergekit_dam.settings import RunSettings

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A checked configuration with the data of its fit, or the coefficients to replay.

    Attributes:
        calibration: per model whose data takes part in the fit; empty in a replay.
        replay: the coefficients to replay, or None.
        seed: of the choice of calibration text.
    """

    checked: Checked
    settings: RunSettings
    calibration: Mapping[ModelReference, CalibrationSet]
    replay: CoefficientFile | None
    seed: int


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
    checked = check_configuration(config, source)
    run = checked.run
    settings = RunSettings(holdout=run.holdout, temperature=run.temperature)
    seed = run.seed if run.seed is not None else options.random_seed or 0
    if run.coefficients is not None:
        replay = CoefficientFile.load(run.coefficients)
        return Prepared(checked, settings, {}, replay, seed)
    models = checked.models
    if checked.base is not None and checked.base not in models:
        models = (*models, checked.base)
    tokenizers = {model: load_tokenizer(model, options.trust_remote_code) for model in models}
    check_agreement({str(model): tokenizer for model, tokenizer in tokenizers.items()})
    calibration = {}
    for model, text in checked.calibrations.items():
        model_config = model.config(trust_remote_code=options.trust_remote_code)
        calibration[model] = load_calibration(
            text,
            model=str(model),
            tokenizer=tokenizers[model],
            samples=run.samples,
            sequence_length=run.sequence_length,
            vocab_size=model_config.get_text_config().vocab_size,
            seed=seed,
        )
    _check_length(checked, options)
    return Prepared(checked, settings, calibration, None, seed)


def _check_length(checked: Checked, options: MergeOptions) -> None:
    """Refuse sequences longer than a model has positions for."""
    for model in checked.calibrations:
        config = model.config(trust_remote_code=options.trust_remote_code).get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        if longest and checked.run.sequence_length > longest:
            raise CalibrationError(
                f"calibration of {model}: `sequence_length` is {checked.run.sequence_length}, but "
                f"the model has {longest} positions; set `sequence_length: {longest}` or less"
            )
