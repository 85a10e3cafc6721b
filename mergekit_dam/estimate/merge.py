"""A merge as mergekit would run it, planned from headers and configurations alone.

1. The configuration is checked. Calibration sequences have a shape; no text is read for them.
2. mergekit's planner makes its plan, which is turned into stages of the fit, as for a merge.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.options import MergeOptions

from mergekit_dam.calibration.mixture import divided, parse_sources
from mergekit_dam.calibration.sets import CalibrationSet, Provenance
from mergekit_dam.estimate.hub import header_loader
from mergekit_dam.host import plugin
from mergekit_dam.host.architectures import check_readable
from mergekit_dam.host.compat import (
    GatherTensors,
    LazyTensorLoader,
    LoaderCache,
    PermutedVocabulary,
    SaveTensor,
    TruncatedVocabulary,
    get_architecture_info,
)
from mergekit_dam.host.gathers import TeachersVocabulary
from mergekit_dam.host.headers import Header, header_of
from mergekit_dam.host.prepare import Prepared, PreparedConfiguration, check
from mergekit_dam.host.references import with_sources
from mergekit_dam.host.synthetic import Writing, writings
from mergekit_dam.host.tasks import (
    FitStage,
    MergedTensor,
    MergeKnown,
    Piece,
    Search,
    WriteArtifacts,
)
from mergekit_dam.request.document import Document
from mergekit_dam.request.models import check_depth, check_length
from mergekit_dam.request.reading import read_configuration
from mergekit_dam.sources.stage import Stage


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor.

    Attributes:
        headers: the tensor's header in the files of each source; None where there is none.
        dtype: the dtype that sources are converted to as they are loaded; None keeps theirs.
        rows: dimension and size of the merged vocabulary, where it is not that of the sources.
        copies: copies in memory per source after vocabularies are aligned: 0 where they agree, 2
            where the teacher keeps its own rows.
    """

    headers: Mapping[ModelReference, Header | None]
    dtype: torch.dtype | None
    rows: tuple[int, int] | None = None
    copies: int = 0


@dataclass(frozen=True)
class PlannedMerge:
    """A merge that mergekit would run.

    Attributes:
        prepared: the checked configuration, with calibration sequences that have no tokens.
        tensors: output tensors by name.
        stages: input, blocks and output of the model; none where nothing is fitted.
        out_dtype: the dtype that tensors are written in; None for the dtype they are loaded in.
        files: bytes of each model's files, as far as headers name them.
        writing: what each model takes that writes its own calibration text.
    """

    prepared: Prepared
    tensors: Mapping[str, PlannedTensor]
    stages: tuple[Stage, ...]
    out_dtype: torch.dtype | None
    files: tuple[tuple[int, ...], ...]
    writing: tuple[Writing, ...] = ()


def plan_merge(file: Path, options: MergeOptions, out_path: Path) -> PlannedMerge:
    """Plan the merge of a file; otherwise as `planned`."""
    plugin.install()
    return planned(*read_configuration(file), options, out_path)


def planned(
    config: MergeConfiguration, document: Document, options: MergeOptions, out_path: Path
) -> PlannedMerge:
    """Plan a merge.

    Args:
        config: the configuration, read with the plugin installed.
        document: the YAML that it is of.
        options: options of the merge.
        out_path: where the merged model would go; nothing is written there.

    Raises:
        DamError: the merge would be refused. Faults of text or weights are not found.
    """
    from mergekit_dam.host.compat import (
        MergePlanner,
        out_model_config,  # as run_merge does
    )

    config = with_sources(config)
    prepared = _without_text(check(config, options, document))
    carried = PreparedConfiguration.create(config, prepared)
    check_readable(carried.referenced_models(), options)
    check_depth(config, prepared.checked, options)
    check_length(prepared.checked, options)
    architecture = get_architecture_info(carried, options)
    LoaderCache().setup(options=options)
    with _headers_alone(carried.referenced_models(), options):
        out_config = out_model_config(
            carried, architecture, trust_remote_code=options.trust_remote_code
        )
        tasks = MergePlanner(carried, architecture, options, out_config).plan_to_disk(str(out_path))
        tensors = {
            name: _tensor(_gather(merged), prepared)
            for name, merged in map(_whole, tasks)
            if merged is not None
        }
        files = _files(tensors.values())
    last = next(task.last for task in tasks if isinstance(task, WriteArtifacts))
    out_dtype = dtype_from_name(config.out_dtype)
    authors = writings(prepared.checked, options.trust_remote_code) if last is not None else {}
    writing = tuple(authors.values())
    return PlannedMerge(prepared, tensors, tuple(_stages(last)), out_dtype, files, writing)


def _without_text(prepared: Prepared) -> Prepared:
    """The same merge with calibration sequences that have a number and a length, but no tokens."""
    run = prepared.run
    if prepared.replay is not None or not prepared.checked.learns:
        return prepared
    calibration = {}
    for model, value in prepared.checked.calibrations.items():
        samples = sum(divided(parse_sources(value), run.samples))
        tokens = torch.empty(samples, run.sequence_length, dtype=torch.long, device="meta")
        provenance = _provenance(str(model), str(value), samples, run.sequence_length)
        calibration[model] = CalibrationSet(tokens=tokens, provenance=provenance)
    return dataclasses.replace(prepared, calibration=calibration)


def _provenance(model: str, text: str, sequences: int, length: int) -> Provenance:
    """The provenance of sequences that were not read."""
    return Provenance(
        model=model,
        source=text,
        files=(),
        dataset=None,
        revision=None,
        split=None,
        seed=0,
        read_as="",
        documents_read=0,
        documents_used=0,
        empty_skipped=0,
        tokens_available=0,
        tokens_used=sequences * length,
        sequences=sequences,
        sequence_length=length,
        cut=(),
        sha256="",
    )


@contextlib.contextmanager
def _headers_alone(models: Iterable[ModelReference], options: MergeOptions) -> Iterator[None]:
    """Have mergekit find headers without weights.

    Of a model on the Hub, they are read from there. An adapter's base is taken in its place:
    merging the adapter would read weights.
    """
    loaders, replaced = LoaderCache().loaders, []
    with tempfile.TemporaryDirectory(prefix="dam-headers-", ignore_cleanup_errors=True) as folder:
        try:
            for model in (model for model in models if model not in loaders):
                base = ModelReference(model=model.model)
                own = Path(tempfile.mkdtemp(dir=folder))
                found: LazyTensorLoader | None = header_loader(base, options, own)
                if found is None and model.lora is not None:
                    found = model.lazy_loader(options.transformers_cache, options.lazy_unpickle)
                if found is not None:
                    loaders[model] = found
                    replaced.append(model)
            yield
        finally:
            for model in replaced:
                del loaders[model]


def _whole(task: Task[Any]) -> tuple[str, Task[Any] | None]:
    """Name of the tensor that a task writes, and the task that merges it.

    Of a piece, these are the tensor that it is cut out of and its task. Other tasks have neither.
    """
    if not isinstance(task, SaveTensor):
        return "", None
    if isinstance(task.tensor_task, Piece):
        return task.tensor_task.region.whole, task.tensor_task.whole
    return task.tensor_name, task.tensor_task


def _gather(task: Task[Any]) -> Task[Any]:
    """The task that loads a tensor of all sources."""
    if isinstance(task, MergedTensor):
        node = task.fit.node
        names = [spec.name for spec in node.planned.stage.tensors]
        return node.planned.gathers[names.index(task.name)]
    assert isinstance(task, MergeKnown)
    return task.known.gather


def _tensor(gather: Task[Any], prepared: Prepared) -> PlannedTensor:
    rows = None
    copies = sum(isinstance(gather, k) for k in (PermutedVocabulary, TeachersVocabulary))
    if isinstance(gather, PermutedVocabulary) and prepared.vocabulary is not None:
        rows = gather.vocabulary_axis, prepared.vocabulary.size
    elif isinstance(gather, TruncatedVocabulary) and prepared.rows is not None:
        axis = gather.weight_info.vocabulary_axis
        assert axis is not None  # of what is cut
        rows = axis, prepared.rows
    while not isinstance(gather, GatherTensors):
        gather = gather.gather_tensors  # type: ignore[attr-defined]
    infos = dict(gather.weight_info.data)
    forced = next((info.force_dtype for info in infos.values() if info.force_dtype), None)
    headers = {model: header_of(info, model) for model, info in infos.items()}
    return PlannedTensor(headers, dtype_from_name(forced or gather.dtype), rows, copies)


def _files(tensors: Iterable[PlannedTensor]) -> tuple[tuple[int, ...], ...]:
    """Bytes of each model's files, as far as headers name them."""
    found: dict[ModelReference, set[Path]] = {}
    for tensor in tensors:
        for model, header in tensor.headers.items():
            found.setdefault(model, set()).update([] if header is None else [header.file])
    return tuple(tuple(file.stat().st_size for file in sorted(own)) for own in found.values())


def _stages(last: FitStage | Search | None) -> list[Stage]:
    """The stages of a fit, in the order the data passes them."""
    if last is None:
        return []
    if isinstance(last, Search):
        return list(last.node.network.stages)
    before = last.node.previous
    return [*_stages(before), last.node.planned.stage]
