"""The output folder of a merge, and those of the processes that help."""

import errno
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mergekit.common import ModelReference

from mergekit_dam.errors import DamError, first_line
from mergekit_dam.host.publish import check_replaceable, publish
from mergekit_dam.host.workplace import KEPT, SCRATCH, workplace
from mergekit_dam.interrupts import terminable
from mergekit_dam.streams import distributed

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ROOM_SAID = re.compile(
    rf"(os error|code:) ({'|'.join(map(str, _NO_ROOM))})\b"  # safetensors
    r"|\d+ requested and \d+ written"  # numpy
    r"|enforce fail at inline_container"  # torch.save
)


@contextmanager
def output_folder(out_path: Path, models: Sequence[ModelReference]) -> Iterator[Path]:
    """The folder that a merge writes to, which takes the output's place when the body is done.

    The first process writes the merged model; the others have temporary folders. If the body
    fails, what is at the output stays as it was; what is worth continuing is kept beside it.

    Args:
        out_path: folder of the merged model.
        models: everything that is merged.

    Raises:
        DamError: the output folder cannot be used; the message says why.
    """
    output = out_path.resolve()
    with terminable() as uninterrupted, _short_of_room(output), ExitStack() as held:

        def begin() -> Path:
            check_output(output, models)
            return held.enter_context(workplace(output))

        place = distributed.from_first(begin)
        if not distributed.is_first():
            beside = next((f for f in (place, output.parent) if f.is_dir()), None)
            yield Path(held.enter_context(_scratch(beside)))
            return
        new = place / "new" / output.name  # the model card has the name of the folder
        new.mkdir(parents=True)
        try:
            yield new
        except BaseException:
            uninterrupted()
            raise
        uninterrupted()
        publish(new, output, place)


def kept_beside(folder: Path) -> Path:
    """The folder for what the next run continues from, given that of the first process."""
    return folder.parents[1] / KEPT


def _scratch(beside: Path | None) -> "tempfile.TemporaryDirectory[str]":
    """A temporary folder for hidden states: there is room for them on the disk of the output."""
    # The first process removes its workplace with all that is in it.
    return tempfile.TemporaryDirectory(prefix=SCRATCH, dir=beside, ignore_cleanup_errors=True)


def check_output(output: Path, models: Sequence[ModelReference]) -> None:
    """Refuse an output folder that no merge may write to.

    Args:
        output: folder of the merged model, resolved.
        models: everything that is merged.

    Raises:
        DamError: it is one of the models, holds one or lies in one; or its files are no merge's.
    """
    _refuse_sources(output, models)
    check_replaceable(output)


def _refuse_sources(output: Path, models: Sequence[ModelReference]) -> None:
    for model in models:
        for part in (model.model, model.lora):
            folder = None if part is None else Path(part.path)
            if folder is None or not folder.exists():
                continue
            source = folder.resolve()
            if source.is_relative_to(output) or output.is_relative_to(source):
                raise DamError(
                    f"{output}: required an output folder apart from the models that are merged, "
                    f"but {folder} is {_relation(source, output)}; name another folder"
                )


def _relation(source: Path, output: Path) -> str:
    if source == output:
        return "that folder"
    return "in it" if source.is_relative_to(output) else "around it"


@contextmanager
def _short_of_room(output: Path) -> Iterator[None]:
    """Say what to do where a file cannot be written for lack of room."""
    try:
        yield
    except Exception as error:
        if not _tells_of_room(error):
            raise
        raise DamError(
            f"{output}: no room is left on the disk for the merged model or for temporary files "
            f"beside it ({first_line(error)}); make room, or name a "
            f"folder on another disk; `mergekit-dam plan` says how much a merge needs"
        ) from error


def _tells_of_room(error: Exception) -> bool:
    """Whether an error is that of a full disk; some libraries have only a message for it."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return True
    return _NO_ROOM_SAID.search(str(error)) is not None
