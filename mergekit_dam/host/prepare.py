"""Everything that a merge prepares before the first weight is read.

1. Check the configuration. If it asks for a vocabulary, have mergekit build it.
2. For a replay, read the coefficients. Otherwise, load every model's tokenizer, and make the
   model's calibration tokens with it.
3. Translate the tokens into that vocabulary. If there is none, check that the tokenizers agree.
"""

import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import PrivateAttr

from mergekit_dam.calibration.judgement import require_counted
from mergekit_dam.calibration.load import load_calibration
from mergekit_dam.calibration.sets import CalibrationSet
from mergekit_dam.coefficients.file import CoefficientFile
from mergekit_dam.coefficients.rows import Identity
from mergekit_dam.errors import ConfigError, DamError, first_line
from mergekit_dam.host.architectures import check_architectures, check_readable, warn_of_differences
from mergekit_dam.host.names import Names, names_of
from mergekit_dam.host.references import check_sources
from mergekit_dam.host.synthetic import Typist, check_room, writings
from mergekit_dam.host.vocabulary import build_vocabulary
from mergekit_dam.journal import Journal
from mergekit_dam.model.checkpoint import check_checkpoint
from mergekit_dam.parameters import RunParameters
from mergekit_dam.request.check import Checked, check_configuration
from mergekit_dam.request.document import Document
from mergekit_dam.request.models import check_depth, check_length, vocab_size_of
from mergekit_dam.tracking.choose import require_tracker
from mergekit_dam.vocabulary.merged import Vocabulary
from mergekit_dam.vocabulary.tokenizers import check_agreement, load_tokenizer
from mergekit_dam.vocabulary.translation import Translation, refuse_lost

LOG = logging.getLogger(__name__)

READ_ALIKE = 0.9
"""Share of a text's tokens that both tokenizers must read alike; less gives a warning."""


@dataclass(frozen=True)
class Prepared:
    """A checked configuration with the data of its fit, or the coefficients to replay.

    Attributes:
        checked: the checked configuration.
        calibration: tokens of each model whose data takes part in the fit; empty in a replay.
        replay: the coefficients to replay, or None.
        start: the coefficients to start from, or None.
        vocabulary: merged vocabulary, if mergekit builds one; calibration tokens are its ids.
        rows: number of rows that embeddings are cut to, if they are cut.
        names: names of the models and texts in what is written.
        identities: digests of the models of a replay; empty before they are on this machine.
        started: `time.perf_counter()` when the merge began.
        journal: what the merge keeps for a next run, if it keeps anything.
    """

    checked: Checked
    calibration: Mapping[ModelReference, CalibrationSet]
    replay: CoefficientFile | None
    start: CoefficientFile | None = None
    vocabulary: Vocabulary | None = None
    rows: int | None = None
    names: Names = field(default_factory=Names)
    identities: Mapping[ModelReference, Identity] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    journal: Journal | None = None

    @property
    def run(self) -> RunParameters:
        """Parameters of the whole merge, with the seed resolved."""
        return self.checked.run


class PreparedConfiguration(MergeConfiguration):
    """mergekit's configuration, which carries its preparation to the planner."""

    _prepared: Prepared = PrivateAttr()

    @classmethod
    def create(cls, config: MergeConfiguration, prepared: Prepared) -> "PreparedConfiguration":
        """A copy of the configuration that carries its preparation."""
        values = {name: getattr(config, name) for name in MergeConfiguration.model_fields}
        result = cls.model_construct(_fields_set=set(config.model_fields_set), **values)
        result._prepared = prepared
        return result

    def keep(self, journal: Journal | None) -> None:
        """Let the merge keep in a journal how far it is, if there is one."""
        self._prepared = dataclasses.replace(self._prepared, journal=journal)

    @property
    def prepared(self) -> Prepared:
        """The preparation."""
        return self._prepared

    def referenced_models(self) -> list[ModelReference]:
        """The base and the models in the order of the YAML.

        mergekit's own order is that of a set. The first model gives the merged model its
        configuration and tokenizer, so without a base these would change from run to run.
        """
        return all_models(self._prepared.checked)


def all_models(checked: Checked) -> list[ModelReference]:
    """The base, if there is one, and the models in the order of the YAML."""
    return list(dict.fromkeys([*([checked.base] if checked.base else []), *checked.models]))


def prepare(
    config: MergeConfiguration, options: MergeOptions, document: Document | None = None
) -> Prepared:
    """Check a configuration and make its calibration tokens.

    Args:
        config: mergekit's configuration.
        options: mergekit's options.
        document: the parsed YAML, if available.

    Raises:
        ConfigError: the configuration is wrong; every problem is named.
        CalibrationError: a text cannot be used, or the models' tokenizers disagree.
    """
    started = time.perf_counter()
    asked = check(config, options, document)
    check_depth(config, asked.checked, options)
    if asked.replay is not None or not asked.checked.learns:
        return asked
    checked, run = asked.checked, asked.checked.run
    models = all_models(checked)
    check_readable(models, options)
    check_length(checked, options)
    device = torch.device(options.device or "cpu")
    check_room(writings(checked, options.trust_remote_code), run, device)
    tokenizers = {model: load_tokenizer(model, options.trust_remote_code) for model in models}
    warn_of_differences(models, options)
    calibration = {}
    for model, value in checked.calibrations.items():
        translation = None
        if asked.vocabulary is not None:
            translation = Translation(asked.vocabulary, model, tokenizers[model])
        own = load_calibration(
            value,
            model=str(model),
            tokenizer=tokenizers[model],
            samples=run.samples,
            sequence_length=run.sequence_length,
            vocab_size=vocab_size_of(model, options),
            seed=run.random_seed,
            spelled=None if translation is None else translation.spelled,
            write=Typist(model, tokenizers[model], run, options),
        )
        if translation is not None:
            own = _translated(own, translation)
        if run.holdout and not run.held_out(len(own.tokens)):
            LOG.warning(
                "calibration of %s: of one sequence none is held out, so that all fits are judged "
                "by the text that they were fitted to; raise `samples`",
                model,
            )
        require_counted(own, run.held_out(len(own.tokens)), str(model))
        calibration[model] = own
    if asked.vocabulary is None:
        used = {str(model): own.tokens for model, own in calibration.items()}
        check_agreement({str(model): own for model, own in tokenizers.items()}, used)
        if asked.rows is not None:
            for model, own in calibration.items():
                because = f"--unsafe-truncate-embeddings leaves {asked.rows} ids"
                lost = own.tokens[own.tokens >= asked.rows].tolist()
                refuse_lost(lost, model, tokenizers[model], because)
    return dataclasses.replace(asked, calibration=calibration, started=started)


def _translated(own: CalibrationSet, translation: Translation) -> CalibrationSet:
    """A model's calibration set with its tokens translated into the merged vocabulary."""
    share = translation.shared_reading(own.tokens)
    provenance = own.provenance
    if share < READ_ALIKE:
        said = (
            f"the merged model's tokenizer reads {1 - share:.0%} of this text in other tokens than "
            f"the model's own tokenizer, whose tokens the fit uses; the vocabulary of one model "
            f"(`tokenizer: {{source: base}}`) may suit the text better than a union"
        )
        LOG.warning("calibration of %s: %s", translation.model, said)
        provenance = dataclasses.replace(provenance, cut=(*provenance.cut, said))
    tokens = translation.translated(own.tokens)
    return dataclasses.replace(own, tokens=tokens, provenance=provenance)


def check(
    config: MergeConfiguration, options: MergeOptions, document: Document | None = None
) -> Prepared:
    """Prepare everything that needs no text; the calibration stays empty.

    Args:
        config: mergekit's configuration.
        options: mergekit's options.
        document: the parsed YAML, if available.

    Raises:
        ConfigError: the configuration is wrong; every problem is named.
        ArchitectureError: a model cannot be merged.
    """
    checked = check_configuration(config, document, texts=True)
    require_tracker(checked.run.tracking)
    if checked.run.seed is None:
        run = checked.run.model_copy(update={"seed": options.random_seed or 0})
        checked = dataclasses.replace(checked, run=run)
    models = all_models(checked)
    for folder in (Path(model.model.path) for model in models):
        if folder.is_dir():  # what is on the Hub is checked when it was downloaded
            check_checkpoint(folder)
    check_sources(models)
    check_architectures(models, options)
    run, names = checked.run, names_of(checked)

    def with_vocabulary(prepared: Prepared) -> Prepared:
        vocabulary = build_vocabulary(config, models, options.trust_remote_code)
        if vocabulary is not None or not options.unsafe_truncate_embeddings:
            return dataclasses.replace(prepared, vocabulary=vocabulary)
        rows = min(vocab_size_of(model, options) for model in models)
        return dataclasses.replace(prepared, rows=rows)

    check_device(options)
    if run.coefficients is not None:
        replay = CoefficientFile.load(run.coefficients)
        return with_vocabulary(Prepared(checked, {}, replay, names=names))
    if options.multi_gpu and checked.learns:
        raise ConfigError(
            "--multi-gpu: a fit follows the data from one block to the next, on one device; "
            "leave the option out (in place of --gpu-rich: --cuda --low-cpu-memory "
            "--read-to-gpu). A merge with known coefficients, such as a replay, can use it"
        )
    start = None
    if run.start not in ("average", "random"):
        if not Path(run.start).exists():
            raise ConfigError(
                f"start: required `average`, `random`, or the path of the coefficients of an "
                f"earlier dam merge, got {run.start!r}, which does not exist"
            )
        start = CoefficientFile.load(run.start, parameter="start")
    return with_vocabulary(Prepared(checked, {}, None, start, names=names))


def check_device(options: MergeOptions) -> None:
    """Refuse a device that is not available, before anything is read.

    Raises:
        DamError: torch cannot use the device; the message gives torch's reason.
    """
    try:
        torch.empty(1, device=options.device or "cpu")
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise DamError(
            f"--device {options.device}: required a device of this machine (`cpu`, `cuda`, "
            f"`cuda:1`, `mps`, or `auto` for what is available; --cuda is `cuda`); torch cannot "
            f"use it ({first_line(error)})"
        ) from error
