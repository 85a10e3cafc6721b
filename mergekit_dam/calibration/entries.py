"""Entries of `datasets:` in a configuration of axolotl -> values of `calibration:`."""

from collections.abc import Mapping
from typing import Any

from mergekit_dam.calibration.source import OPTIONS, CalibrationSource
from mergekit_dam.calibration.templates import NONE
from mergekit_dam.errors import CalibrationError

_TYPES = {
    "alpaca": {"format": "alpaca", "chat_template": NONE},  # it trains on Alpaca's own prompt
    "chat_template": {"format": "messages"},
    "sharegpt": {"format": "sharegpt"},
    "completion": {"format": "text"},
}
"""Values of `type`, and the options that read such rows."""

_COLUMNS = ("field", "field_messages")
_OF_TRAINING = {
    "ds_type",  # the suffix tells
    "message_field_training",
    "message_field_training_detail",
    "roles_to_train",
    "train_on_eos",
    "train_on_eot",
    "train_on_inputs",
}
"""Keys that do not change the text: they say on which of its tokens axolotl trains."""

_KEYS_OF_MESSAGES = ({"role": "role", "content": "content"}, {"role": "from", "content": "value"})


def as_value(entry: Mapping[str, Any]) -> str:
    """The value of `calibration:` that an entry means: `org/chat:split=train:format=messages`.

    Args:
        entry: `path`, and whatever else axolotl reads (`type`, `split`, `name`, `revision`,
            `field`, `field_messages`); the options of `calibration:` may stand there, too.

    Raises:
        CalibrationError: If a key or its value cannot be followed; the message says which.
    """
    path = entry.get("path")
    if not isinstance(path, str) or not path:
        raise CalibrationError(f"an entry must have a `path`; got {dict(entry)}")
    problems: list[str] = []
    options = _type_options(entry.get("type"), problems)
    for key, value in entry.items():
        if key in ("path", "type", "revision") or key in _OF_TRAINING or value is None:
            continue
        if key in _COLUMNS:
            options["column"] = str(value)
        elif key == "chat_template" and value == "tokenizer_default":
            options.pop("chat_template", None)
        elif key in OPTIONS:
            options[key] = str(value)
        elif key != "message_property_mappings" or value not in _KEYS_OF_MESSAGES:
            problems.append(f"`{key}` is not read; known are path, type, {', '.join(OPTIONS)}")
    if problems:
        raise CalibrationError(f"the entry of {path!r}: " + "; ".join(problems))
    location = f"{path}@{entry['revision']}" if entry.get("revision") else path
    # axolotl calls the rows of a file its training split.
    if options.get("split") == "train" and CalibrationSource.parse(location).kind == "file":
        del options["split"]
    return location + "".join(f":{key}={value}" for key, value in options.items())


def _type_options(kind: Any, problems: list[str]) -> dict[str, str]:
    if kind is None:
        return {}
    name = kind.partition(".")[0] if isinstance(kind, str) else None
    if name not in _TYPES:
        problems.append(
            f"`type: {kind}` is not known ({', '.join(_TYPES)}); leave it out if the columns tell "
            "the format"
        )
        return {}
    return dict(_TYPES[name])
