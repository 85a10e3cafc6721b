"""The tasks of a merge whose coefficients are known: a replay, or copies of one model."""

from mergekit_dam.host.checks import check_shapes
from mergekit_dam.host.initial import copies
from mergekit_dam.host.merge import Merge, Tasks, Tensors
from mergekit_dam.host.phases import known_phase, written
from mergekit_dam.host.replay import saved_record
from mergekit_dam.streams import progress


def known_tasks(merge: Merge, tensors: Tensors) -> Tasks:
    """Merge every tensor by itself; no stage has to run.

    Raises:
        ConfigError: coefficients to replay do not fit the models.
        ArchitectureError: the merged model's configuration has other shapes.
    """
    replay = merge.prepared.replay
    if replay is not None:
        record = saved_record(replay, tensors.specs, range(len(tensors.order)), tensors.shapes)
    else:
        record = copies(tensors.specs)
        if len(tensors.order) > 1:
            check_shapes(merge.decoder(), tensors.shapes)
    shapes = [tensors.shapes.get(spec.name, ()) for spec in tensors.specs]
    progress.plan([known_phase(shapes, len(tensors.order)), *written()])
    pairs = zip(tensors.specs, tensors.tasks, strict=True)
    merged = {s.name: tensors.known(s, task.gather_tensors, record) for s, (_, task) in pairs}
    return Tasks(dict(merged), record=record)
