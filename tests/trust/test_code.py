"""What comes with a model or a text is data: no code of it runs, and nothing is asked for."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mergekit_dam.errors import CheckpointError, DamError
from mergekit_dam.evaluation.evaluation import evaluate
from mergekit_dam.evaluation.named import named_texts
from mergekit_dam.evaluation.settings import EvaluationSettings
from mergekit_dam.lock.folder import output_of
from tests.kit.adapters import save_adapter
from tests.kit.environments import CHECKOUT
from tests.kit.inputs import Inputs
from tests.kit.merging import dam, merge
from tests.kit.models import Models
from tests.kit.texts import Calibration


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that is there once foreign code has run."""
    return tmp_path / "it ran"


@pytest.fixture
def inputs(llama_models: Models, calibration: Calibration, tmp_path: Path) -> Inputs:
    return Inputs(tmp_path, list(llama_models.models), llama_models.base, list(calibration))


def pickled(file: Path, marker: Path) -> None:
    torch.save({"model.norm.weight": torch.ones(16), "x": Payload(marker)}, file)


def test_a_payload_runs_where_anything_may_be_unpickled(tmp_path: Path, marker: Path) -> None:
    pickled(tmp_path / "a.bin", marker)
    torch.load(tmp_path / "a.bin", weights_only=False)
    assert marker.exists()
    marker.unlink()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


@pytest.mark.parametrize("lazy_unpickle", [True, False])
def test_code_in_pickled_weights_does_not_run(
    inputs: Inputs, marker: Path, lazy_unpickle: bool
) -> None:
    model = inputs.own_model()
    (model / "model.safetensors").unlink()
    pickled(model / "pytorch_model.bin", marker)
    with pytest.raises(Exception, match=r"(?i)unpickl|weights|damaged|does not have"):
        merge(inputs.configuration(), inputs.folder / "out", lazy_unpickle=lazy_unpickle)
    assert not marker.exists()


def test_pickled_weights_beside_safetensors_are_not_opened(inputs: Inputs, marker: Path) -> None:
    (inputs.own_model() / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    merge(inputs.configuration(), inputs.folder / "out")
    assert not marker.exists()


def test_code_in_a_pickled_adapter_does_not_run(inputs: Inputs, marker: Path) -> None:
    adapter = save_adapter(inputs.base, inputs.folder / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    pickled(adapter / "adapter_model.bin", marker)
    inputs.models[0] = Path(f"{inputs.base}+{adapter}")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: damaged, or it holds more"):
        merge(inputs.configuration(), inputs.folder / "out")
    assert not marker.exists()


def test_code_in_pickled_weights_that_are_hashed_does_not_run(tmp_path: Path, marker: Path) -> None:
    pickled(tmp_path / "pytorch_model.bin", marker)
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        output_of(tmp_path, ["pytorch_model.bin"], quiet=True)
    assert not marker.exists()


def with_code(model: Path, marker: Path) -> None:
    """Give a model code of its own for its configuration, its class and its tokenizer."""
    (model / "own.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    for name, keys in {
        "config.json": ("AutoConfig", "AutoModelForCausalLM"),
        "tokenizer_config.json": ("AutoTokenizer",),
    }.items():
        values = json.loads((model / name).read_text())
        own = {key: "own.Own" if key != "AutoTokenizer" else ["own.Own", None] for key in keys}
        values |= {"auto_map": own, "model_type": "own", "tokenizer_class": "Own"}
        (model / name).write_text(json.dumps(values))


def merged(inputs: Inputs) -> None:
    merge(inputs.configuration(), inputs.folder / "out")


def evaluated(inputs: Inputs) -> None:
    texts = named_texts([f"a={inputs.texts[0]}"])
    evaluate({"own": str(inputs.models[1])}, texts, EvaluationSettings(sequence_length=8))


@pytest.mark.parametrize("use", [merged, evaluated])
def test_code_that_comes_with_a_model_does_not_run(
    inputs: Inputs, marker: Path, use: Callable[[Inputs], None]
) -> None:
    with_code(inputs.own_model(), marker)
    with pytest.raises((DamError, ValueError), match=r"trust[-_]remote[-_]code"):
        use(inputs)
    assert not marker.exists()


def test_names_of_tensors_are_no_paths(inputs: Inputs) -> None:
    file = inputs.own_model() / "model.safetensors"
    more = {"../../x": torch.ones(2), "/tmp/../x": torch.ones(2)}
    save_file({**load_file(file), **more}, file, metadata={"format": "pt"})
    merge(inputs.configuration(correction="low_rank", correction_rank=2), inputs.folder / "out")
    made = {path.name for path in inputs.folder.iterdir()}
    assert made == {"own_1", "out"}
    assert not more.keys() & load_file(inputs.folder / "out" / "model.safetensors").keys()


WATCHED = """
import sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print("asked for", event, arguments, file=sys.stderr, flush=True)
        raise RuntimeError(f"{event} {arguments}")

sys.addaudithook(watch)
from mergekit.scripts.run_yaml import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("relative", [True, False])
def test_no_network_is_used_where_everything_is_local(
    llama_models: Models, calibration: Calibration, tmp_path: Path, relative: bool
) -> None:
    """`store/model_0` could be the id of a model on the Hub, too."""
    base, models = llama_models.base, llama_models.models
    if relative:
        shutil.copytree(base.parent, tmp_path / "store")
        store = Path("store")
        base, models = store / base.name, tuple(store / model.name for model in models)
    configuration = dam(models, calibration, base=base)
    (tmp_path / "dam.yaml").write_text(yaml.safe_dump(configuration), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, "dam.yaml", "out", "--quiet"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        | {"PYTHONPATH": str(CHECKOUT), "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "asked for" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "dam_report.json").is_file()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_what_a_merge_keeps_meanwhile_is_private(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is made beside the output is in a folder that its owner alone may enter."""
    inputs.models[0] = Path(f"{inputs.base}+{save_adapter(inputs.base, inputs.folder / 'adapter')}")
    seen: dict[str, int] = {}
    replace = os.replace

    def note(source: Any, target: Any, **more: Any) -> None:
        for path in inputs.folder.iterdir():
            seen[path.name] = path.stat().st_mode & 0o777
        replace(source, target, **more)

    monkeypatch.setattr(os, "replace", note)
    before = os.umask(0)
    try:
        merge(inputs.configuration(), inputs.folder / "out")
    finally:
        os.umask(before)
    made = {name: mode for name, mode in seen.items() if name not in ("adapter", "out")}
    assert made == {".dam-out": 0o700}
    assert (inputs.folder / "out").is_dir()
