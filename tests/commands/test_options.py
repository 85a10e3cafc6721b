"""Every option of mergekit-yaml, each through its own command line, in this process."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.scripts.run_yaml import main as mergekit_yaml
from transformers import AutoTokenizer

from tests.kit.merging import Merged, dam, tensors_of
from tests.kit.models import ARCHITECTURES, Models, make_model, save_models, tiny_llama_config
from tests.kit.texts import save_calibration
from tests.kit.tokenizers import make_tokenizer

ONE = tiny_llama_config(num_hidden_layers=1)


@dataclass(frozen=True)
class Case:
    """Two models with text, and what a merge without options makes of them."""

    models: Models
    texts: tuple[Path, Path]
    plain: Merged

    def configuration(self, **parameters: Any) -> dict[str, Any]:
        return dam(self.models.models, self.texts, head=False, **parameters)


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("options")
    models = save_models(folder, ONE, count=2)
    texts = (save_calibration(folder, seed=0), save_calibration(folder, seed=1, offset=24))
    configuration = dam(models.models, texts, head=False)
    return Case(models, texts, merged(configuration, folder / "plain"))


def invoke(
    configuration: dict[str, Any], out: Path, *options: str | Path, beside: Path | None = None
) -> Result:
    """Run mergekit-yaml's own click command.

    Args:
        beside: A folder beside which the configuration stands; models are named relative to that.
    """
    LoaderCache.loaders.clear()
    file = (beside or out).with_suffix(".yml")
    file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
    return CliRunner().invoke(mergekit_yaml, [str(file), str(out), *map(str, options)])


def merged(
    configuration: dict[str, Any], out: Path, *options: str | Path, beside: Path | None = None
) -> Merged:
    result = invoke(configuration, out, *options, beside=beside)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return Merged(out)


def refused(configuration: dict[str, Any], out: Path, *options: str | Path) -> str:
    """The message of a merge that is refused; nothing is left of the merge."""
    result = invoke(configuration, out, *options)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), repr(result.exception)  # and no traceback
    assert not out.exists()
    return result.output


def change_nothing(*options: str) -> Callable[[Case, Path], None]:
    def check(case: Case, folder: Path) -> None:
        found = merged(case.configuration(), folder / "out", *options, beside=case.plain.path)
        assert found.model_bytes == case.plain.model_bytes
        assert found.coefficient_bytes == case.plain.coefficient_bytes
        names = {file.name for file in found.path.iterdir()}
        assert names == {file.name for file in case.plain.path.iterdir()}

    return check


def allow_crimes(case: Case, folder: Path) -> None:
    """Mistral has the tensors of Llama, and attends to fewer tokens."""
    config = ARCHITECTURES["mistral"]()
    config.num_hidden_layers = 1
    other = save_models(folder, config, count=1).models[0]
    configuration = dam([case.models.models[0], other], case.texts, head=False)
    assert "Must specify --allow-crimes" in refused(configuration, folder / "refused")
    assert merged(configuration, folder / "out", "--allow-crimes").load()


def unsafe_truncate_embeddings(case: Case, folder: Path) -> None:
    config = tiny_llama_config(num_hidden_layers=1, vocab_size=80)
    other = save_models(folder, config, count=1).models[0]
    configuration = dam([case.models.models[0], other], case.texts, head=False)
    message = refused(configuration, folder / "refused")
    assert "model.embed_tokens.weight: shapes differ" in message
    found = merged(configuration, folder / "out", "--unsafe-truncate-embeddings")
    assert found.tensors["model.embed_tokens.weight"].shape == (64, 16)
    found.load()


def transformers_cache(case: Case, folder: Path) -> None:
    change_nothing("--transformers-cache", str(folder / "cache"))(case, folder)


def lora_merge_cache(case: Case, folder: Path) -> None:
    """And its dtype: weights are merged in it, and then converted."""
    peft = pytest.importorskip("peft")
    base = make_model(ONE).from_pretrained(case.models.base)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.0625)
    model.save_pretrained(folder / "adapter")
    reference = f"{case.models.base}+{folder / 'adapter'}"
    configuration = {"merge_method": "dam", "models": [{"model": reference}]}
    for dtype in ("float32", "bfloat16"):
        cache = folder / dtype
        options = ("--lora-merge-cache", str(cache), "--lora-merge-dtype", dtype)
        found = merged(configuration, folder / f"out-{dtype}", *options)
        written = list(cache.rglob("*.safetensors"))
        assert len(written) == 1
        assert {t.dtype for t in tensors_of(written[0].parent).values()} == {getattr(torch, dtype)}
        name = "model.layers.0.self_attn.q_proj.weight"
        scale = config.lora_alpha / config.r
        moved = tensors_of(case.models.base)[name] + scale * 2 * 0.0625**2
        close = 1e-6 if dtype == "float32" else 4e-3
        torch.testing.assert_close(found.tensors[name].float(), moved, rtol=0, atol=close)


def lora_merge_dtype(case: Case, folder: Path) -> None:
    lora_merge_cache(case, folder)


def cuda(case: Case, folder: Path) -> None:
    if torch.cuda.is_available():
        merged(case.configuration(), folder / "out", "--cuda").load()
        return
    message = refused(case.configuration(), folder / "out", "--cuda")
    assert "--device cuda: required a device of this machine" in message


def device(case: Case, folder: Path) -> None:
    change_nothing("--device", "cpu")(case, folder)
    shutil.rmtree(folder / "out")
    assert "torch cannot use it" in refused(case.configuration(), folder / "x", "--device", "tpu")
    if not torch.cuda.is_available() and not torch.xpu.is_available():
        change_nothing("--device", "auto")(case, folder)


def out_shard_size(case: Case, folder: Path) -> None:
    found = merged(case.configuration(), folder / "out", "--out-shard-size", "1K")
    index = json.loads((found.path / "model.safetensors.index.json").read_text("utf-8"))
    assert index["weight_map"].keys() == case.plain.tensors.keys()
    assert len(set(index["weight_map"].values())) > 2
    state = found.load().state_dict()
    assert all(torch.equal(state[name], t) for name, t in case.plain.tensors.items())


def copy_tokenizer(case: Case, folder: Path) -> None:
    assert len(AutoTokenizer.from_pretrained(case.plain.path)) == len(make_tokenizer())
    found = merged(case.configuration(), folder / "out", "--no-copy-tokenizer")
    assert not list(found.path.glob("tokenizer*"))
    assert found.model_bytes == case.plain.model_bytes


def trust_remote_code(case: Case, folder: Path) -> None:
    """A model that brings code of its own, which is not run without the option."""
    models = []
    for number, model in enumerate(case.models.models):
        path = folder / f"remote_{number}"
        shutil.copytree(model, path)
        (path / "configuration_own.py").write_text(_REMOTE_CONFIGURATION, encoding="utf-8")
        (path / "modeling_own.py").write_text(_REMOTE_MODEL, encoding="utf-8")
        config = json.loads((path / "config.json").read_text("utf-8"))
        config["model_type"] = "own_llama"
        config["auto_map"] = {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.LlamaForCausalLM",
        }
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        models.append(path)
    configuration = dam(models, case.texts, head=False)
    assert invoke(configuration, folder / "refused").exit_code == 1
    assert not (folder / "refused").exists()
    found = merged(configuration, folder / "out", "--trust-remote-code")
    assert found.model_bytes == case.plain.model_bytes


_REMOTE_CONFIGURATION = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""

_REMOTE_MODEL = """
from transformers import LlamaForCausalLM as Stock

from .configuration_own import OwnConfig


class LlamaForCausalLM(Stock):
    config_class = OwnConfig
"""


def random_seed(case: Case, folder: Path) -> None:
    """It chooses the calibration text, unless the configuration has a seed."""
    found = [
        merged(configuration, folder / str(number), "--random-seed", seed)
        for number, (configuration, seed) in enumerate(
            [
                (case.configuration(), "3"),
                (case.configuration(), "3"),
                (case.configuration(), "0"),
                (case.configuration(seed=0), "3"),
            ]
        )
    ]
    assert found[0].model_bytes == found[1].model_bytes != case.plain.model_bytes
    assert found[2].model_bytes == found[3].model_bytes == case.plain.model_bytes


def lazy_unpickle(case: Case, folder: Path) -> None:
    pickled = []
    for model in case.models.models:
        pickled.append(folder / model.name)
        shutil.copytree(model, pickled[-1], ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save(tensors_of(model), pickled[-1] / "pytorch_model.bin")
    configuration = dam(pickled, case.texts, head=False)
    for option in ("--lazy-unpickle", "--no-lazy-unpickle"):
        found = merged(configuration, folder / option, option)
        assert found.model_bytes == case.plain.model_bytes


def write_model_card(case: Case, folder: Path) -> None:
    card = (case.plain.path / "README.md").read_text("utf-8")
    assert "[Differentiable Adaptive Merging](https://arxiv.org/abs/2410.08371)" in card
    found = merged(case.configuration(), folder / "out", "--no-write-model-card")
    assert not {"README.md", "mergekit_config.yml"} & {file.name for file in found.path.iterdir()}
    assert found.model_bytes == case.plain.model_bytes


def safe_serialization(case: Case, folder: Path) -> None:
    options = ("--no-safe-serialization",)
    found = merged(case.configuration(), folder / "out", *options, beside=case.plain.path)
    pickled = torch.load(found.path / "pytorch_model.bin", weights_only=True)
    assert pickled.keys() == case.plain.tensors.keys()
    assert all(torch.equal(pickled[name], t) for name, t in case.plain.tensors.items())
    assert found.coefficient_bytes == case.plain.coefficient_bytes
    found.load()


def multi_gpu(case: Case, folder: Path) -> None:
    message = refused(case.configuration(), folder / "out", "--multi-gpu")
    assert "--multi-gpu: a fit follows the data from one block to the next" in message


def gpu_rich(case: Case, folder: Path) -> None:
    message = refused(case.configuration(), folder / "out", "--gpu-rich")
    assert ("--multi-gpu: a fit" if torch.cuda.is_available() else "--device cuda:") in message


def quiet(case: Case, folder: Path) -> None:
    result = invoke(case.configuration(), folder / "out", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    loud = invoke(case.configuration(), folder / "loud")
    assert "phases: " in loud.output
    assert "Executing graph" not in loud.output  # mergekit's bar, which would stand still


def num_threads(case: Case, folder: Path) -> None:
    with mock.patch("torch.set_num_interop_threads") as taken:  # torch takes that number but once
        change_nothing("--num-threads", "1")(case, folder)
    taken.assert_called_once_with(1)
    assert torch.get_num_threads() == 1


OPTIONS: dict[str, Callable[[Case, Path], None]] = {
    "allow_crimes": allow_crimes,
    "unsafe_truncate_embeddings": unsafe_truncate_embeddings,
    "transformers_cache": transformers_cache,
    "lora_merge_cache": lora_merge_cache,
    "lora_merge_dtype": lora_merge_dtype,
    "cuda": cuda,
    "device": device,
    "low_cpu_memory": change_nothing("--low-cpu-memory"),
    "out_shard_size": out_shard_size,
    "copy_tokenizer": copy_tokenizer,
    "clone_tensors": change_nothing("--clone-tensors"),
    "trust_remote_code": trust_remote_code,
    "random_seed": random_seed,
    "lazy_unpickle": lazy_unpickle,
    "write_model_card": write_model_card,
    "safe_serialization": safe_serialization,
    "verbosity": change_nothing("-v", "-v"),
    "quiet": quiet,
    "read_to_gpu": change_nothing("--read-to-gpu"),  # to --device, which is the CPU
    "multi_gpu": multi_gpu,
    "num_threads": num_threads,
    "gpu_rich": gpu_rich,
    "async_write": change_nothing("--async-write"),
    "write_threads": change_nothing("--async-write", "--write-threads", "3"),
}


def test_every_option_of_mergekit_is_tried() -> None:
    assert OPTIONS.keys() == MergeOptions.model_fields.keys()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.parametrize("name", OPTIONS)
def test_option(case: Case, tmp_path: Path, name: str) -> None:
    OPTIONS[name](case, tmp_path)


@pytest.mark.parametrize("prefix", ["", "./"])
def test_relative_paths_need_no_hub(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    """mergekit asks the Hub whether `models/a` is there, for the model card, after the merge."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(case.models.base.parent, "models")
    configuration = case.configuration()
    for entry in configuration["models"]:
        entry["model"] = f"{prefix}models/{Path(entry['model']).name}"
        entry["parameters"]["calibration"] = (
            f"models/{Path(entry['parameters']['calibration']).name}"
        )
    found = merged(configuration, tmp_path / "out")
    assert found.model_bytes == case.plain.model_bytes
    card = (found.path / "README.md").read_text("utf-8")
    assert "huggingface.co/models" not in card
