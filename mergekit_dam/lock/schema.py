"""`dam_lock.json`: everything that a merge is made again from, and digests of all that it wrote.

Paths are names relative to the folder of the configuration file, or ends of paths. Nothing in the
file differs between two runs of one merge on one machine.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mergekit_dam.errors import DamError, first_line
from mergekit_dam.stored import written_whole
from mergekit_dam.untrusted import parsed_json, stays_inside

LOCK_NAME = "dam_lock.json"
VERSION = 1
"""Version of the schema."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _inside(name: str) -> str:
    if not stays_inside(name):
        raise ValueError("a name has to stay inside of its folder")
    return name


FileName = Annotated[str, AfterValidator(_inside)]
"""A file of a folder, or of a folder in it."""

Files = Mapping[FileName, Sha256]
"""File -> sha256."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Origin(_Part):
    """A model or an adapter, as it was read.

    Attributes:
        name: What the configuration calls it: an id on the Hub, or the name of a folder.
        repository: Its id on the Hub; None for a local folder.
        revision: The commit of the repository.
        files: All files that were read of it.
    """

    name: str
    repository: str | None = None
    revision: str | None = None
    files: Files


class Source(_Part):
    """A model of the merge; the base is one of them.

    Attributes:
        name: Its name in the coefficients and in the report.
        model: Its files, or those of the adapter's base.
        adapter: The adapter, if there is one.
    """

    name: str
    model: Origin
    adapter: Origin | None = None


class Text(_Part):
    """Calibration text of one model.

    Attributes:
        sha256: Digest of the token ids as little-endian int64, row by row, and of which tokens
            count in losses, if not all do.
        source: The value of `calibration`; None if a replay does not know it.
        dataset: Id on the Hub.
        revision: Its commit.
        kept: File beside the merged model that keeps text which the model wrote.
        parts: The same of every source, if there are several.
    """

    sha256: Sha256
    source: str | None = None
    dataset: str | None = None
    revision: str | None = None
    kept: FileName | None = None
    parts: tuple["Text", ...] = ()


class TensorDigest(_Part):
    """One tensor of the merged model: dtype as its file names it, shape, sha256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: Sha256


class Output(_Part):
    """What the merge wrote.

    Attributes:
        files: Every file but the lock, the report, the model card and pictures.
        report: sha256 of the report's values without those of `this_run`; None if there is none.
        tensors: Every tensor of the merged model.
    """

    files: Files
    report: Sha256 | None
    tensors: Mapping[str, TensorDigest]


class Lock(_Part):
    """The lock of a merge.

    Attributes:
        schema_version: Version of this schema.
        configuration: The YAML of the merge.
        options: mergekit's options that change what is written.
        parameters: All parameters with their defaults, as resolved for the tensors.
        sources: The models.
        calibration: The text of each model by name.
        replayed: Whether coefficients were replayed rather than fitted.
        versions: Versions of the packages that computed.
        computed_on: Kind of device, number of threads and processes.
        output: What was written.
    """

    schema_version: Literal[1] = 1
    configuration: str
    options: Mapping[str, bool | int | str]
    parameters: Mapping[str, Any]
    sources: tuple[Source, ...]
    calibration: Mapping[str, Text]
    replayed: bool
    versions: Mapping[str, str]
    computed_on: Mapping[str, str | int]
    output: Output

    def write(self, folder: Path) -> None:
        """Write the lock of a folder: keys are sorted, and what is None is left out."""
        values = self.model_dump(mode="json", exclude_none=True)
        with written_whole(folder / LOCK_NAME) as temporary:
            temporary.write_text(canonical(values) + "\n", encoding="utf-8")


def canonical(values: Any) -> str:
    """JSON with sorted keys and fixed separators: equal values give equal text."""
    return json.dumps(
        values,
        sort_keys=True,
        indent=1,
        separators=(",", ": "),
        ensure_ascii=False,
        allow_nan=False,
    )


def read_lock(path: Path) -> Lock:
    """Read a lock.

    Args:
        path: The file, or the folder that holds it.

    Raises:
        DamError: There is none, or it is damaged, or of a version that is not known.
    """
    file = path / LOCK_NAME if path.is_dir() else path
    try:
        values = parsed_json(file.read_bytes())
    except OSError as error:
        raise DamError(
            f"{file}: required a {LOCK_NAME} or the folder of a dam merge that holds one, which "
            f"cannot be read ({error.strerror or error}); merges of older versions wrote none"
        ) from error
    except ValueError as error:
        raise DamError(
            f"{file}: required the JSON of a {LOCK_NAME}, got a file that is damaged "
            f"({first_line(error)})"
        ) from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != VERSION:
        raise DamError(
            f"{file}: required a lock with `schema_version` {VERSION}, got {version}; read it with "
            f"the version of mergekit-dam that wrote it, or merge again"
        )
    try:
        return Lock.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DamError(
            f"{file}: {place}: {first['msg'][0].lower()}{first['msg'][1:]}; the file was changed: "
            f"take an intact one"
        ) from error
