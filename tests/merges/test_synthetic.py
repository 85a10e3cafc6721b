"""Merges on text that the models write themselves."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from tqdm import tqdm
from transformers import PreTrainedModel

from mergekit_dam.calibration.synthetic import BATCH, Author
from mergekit_dam.coefficients.file import CoefficientFile
from mergekit_dam.errors import CalibrationError, ConfigError, DamError
from mergekit_dam.host import synthetic
from mergekit_dam.host.prepare import prepare
from mergekit_dam.request.check import check_configuration
from tests.kit.adapters import save_adapter
from tests.kit.estimates import inventory, planned_estimate
from tests.kit.inputs import Inputs
from tests.kit.merging import Merged, dam, merge
from tests.kit.models import Models, loaded
from tests.kit.processes import finish, start_merges
from tests.kit.texts import Calibration
from tests.kit.tokenizers import CHAT, make_tokenizer
from tests.kit.vocabularies import Pair


@pytest.fixture(scope="module")
def own_words(llama_models: Models, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    """A merge on the text of its models."""
    configuration = dam(llama_models.models, ["self"] * 2, base=llama_models.base)
    return merge(configuration, tmp_path_factory.mktemp("own") / "out")


def kept(merged: Merged, *names: str) -> list[Path]:
    return [merged.path / f"dam_calibration.{name}.jsonl" for name in names]


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def written_by(model: PreTrainedModel) -> list[list[int]]:
    """What a model writes for a merge of `SMALL`."""
    with tqdm(disable=True) as progress, torch.inference_mode():
        author = Author(model, make_tokenizer(), length=16, seed=0, progress=progress)
        return author.write(4 * 16, (None,))


def test_what_was_written_is_kept_and_makes_the_same_merge_again(
    own_words: Merged, llama_models: Models, tmp_path: Path
) -> None:
    files = kept(own_words, "model_0", "model_1")
    again = merge(dam(llama_models.models, files, base=llama_models.base), tmp_path / "out")
    assert again.model_bytes == own_words.model_bytes
    tokenizer = make_tokenizer()
    for file in files:
        for row in rows_of(file):
            assert row["written_text"] == tokenizer.decode(row["input_ids"])


def test_the_same_seed_writes_the_same_text_and_another_does_not(
    own_words: Merged, llama_models: Models, tmp_path: Path
) -> None:
    torch.manual_seed(9)
    files = kept(own_words, "model_0", "model_1")
    same, other = (
        merge(
            dam(llama_models.models, base=llama_models.base, calibration="self", seed=seed),
            tmp_path / f"{seed}",
        )
        for seed in (0, 1)
    )
    for file in files:
        assert (same.path / file.name).read_bytes() == file.read_bytes()
        assert (other.path / file.name).read_bytes() != file.read_bytes()
    assert same.model_bytes == own_words.model_bytes


def test_it_is_said_that_text_is_synthetic(
    llama_models: Models,
    calibration: Calibration,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = (model.name for model in llama_models.models)
    caplog.set_level("INFO")
    merged = merge(dam(llama_models.models, ["self", calibration[1]]), tmp_path / "out")
    said = [line for line in caplog.messages if "synthetic" in line]
    assert len(said) == 1
    assert f"calibration of {llama_models.models[0]}" in said[0]
    calibrations = merged.report["calibration"]
    assert [calibrations[model]["synthetic"] for model in (first, second)] == [True, False]
    assert merged.report["calibration_synthetic"] == [first]
    assert CoefficientFile.load(merged.path).metadata["calibration_synthetic"] == [first]
    assert not kept(merged, "model_1")[0].exists()
    (file,) = kept(merged, "model_0")
    again = merge(dam(llama_models.models, [file, calibration[1]]), tmp_path / "again")
    assert again.report["calibration_synthetic"] == [first]


def test_what_a_model_writes_is_what_it_writes_by_itself(
    own_words: Merged, llama_models: Models
) -> None:
    model = loaded(llama_models.models[0])
    expected = written_by(model)
    assert [row["input_ids"] for row in rows_of(kept(own_words, "model_0")[0])] == expected


def test_an_adapter_writes_what_its_merged_model_writes(
    llama_models: Models, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's
        adapter = save_adapter(llama_models.base, tmp_path / "skill", ("q_proj", "down_proj"))
        make_tokenizer().save_pretrained(adapter)
        models = [Path(f"{llama_models.base}+{adapter}"), llama_models.models[1]]
        configuration = dam(models, ["self"] * 2, base=llama_models.base)
        cache = str(tmp_path / "cache")
        merged = merge(configuration, tmp_path / "out", lora_merge_cache=cache)
        model = peft.PeftModel.from_pretrained(loaded(llama_models.base), adapter)
        expected = written_by(model.merge_and_unload())
    assert [row["input_ids"] for row in rows_of(kept(merged, "skill")[0])] == expected


def test_text_is_translated_into_a_merged_vocabulary(pair: Pair, tmp_path: Path) -> None:
    settings = {"tokenizer": {"source": "union"}}
    merged = merge(dam(pair.models, ["self"] * 2, settings=settings), tmp_path / "out")
    files = kept(merged, "left", "right")
    again = merge(dam(pair.models, files, settings=settings), tmp_path / "again")
    assert again.model_bytes == merged.model_bytes


def test_models_of_one_name_keep_their_texts_apart(tmp_path: Path, inputs: Inputs) -> None:
    for index in range(2):
        model = inputs.own_model(index)
        inputs.models[index] = model.rename(_made(tmp_path / f"{index}") / "same")
        inputs.texts[index] = "self"
    merged = merge(inputs.configuration(), tmp_path / "out")
    first, second = (rows_of(file) for file in kept(merged, "same", "same-2"))
    assert first != second


def test_a_chat_template_gives_half_of_the_text_unless_a_start_is_named(
    inputs: Inputs, tmp_path: Path
) -> None:
    model = inputs.own_model(0)
    tokenizer = make_tokenizer()
    # "[user]" is no word of this tokenizer: it is one unknown token.
    tokenizer.chat_template = CHAT.replace("[{{", "{{").replace("}}]", "}}")
    tokenizer.save_pretrained(model)
    shares = []
    for source in ("self", "self:start=text", "self:start=chat"):
        inputs.texts[0] = source
        config = MergeConfiguration.model_validate(inputs.configuration(samples=40))
        written = prepare(config, MergeOptions(quiet=True)).calibration
        own = next(iter(written.values())).written
        chats = [d for d in own if d.text.startswith("<s> <unk>") or "</s>" in d.text]
        shares.append(sum(len(d.input_ids) for d in chats) / sum(len(d.input_ids) for d in own))
    assert 0.4 < shares[0] < 0.6
    assert shares[1:] == [0, 1]


def test_a_part_of_the_text_may_be_real(
    llama_models: Models, calibration: Calibration, tmp_path: Path
) -> None:
    first = llama_models.models[0].name
    mixed = [str(calibration[0]), "self:share=0.25"]
    configuration = dam(llama_models.models, [None, calibration[1]])
    configuration["models"][0]["parameters"] = {"calibration": mixed}
    merged = merge(configuration, tmp_path / "out")
    own = merged.report["calibration"][first]
    parts = [(part["synthetic"], part["sequences"]) for part in own["parts"]]
    assert parts == [(False, 3), (True, 1)]
    assert merged.report["calibration_synthetic"] == [first]
    (file,) = kept(merged, "model_0")
    configuration["models"][0]["parameters"] = {"calibration": [mixed[0], f"{file}:share=0.25"]}
    again = merge(configuration, tmp_path / "again")
    assert again.model_bytes == merged.model_bytes
    assert again.report["calibration_synthetic"] == [first]


class TestRefused:
    def test_a_model_that_does_not_fit_with_its_numbers(self, inputs: Inputs) -> None:
        inputs.texts[0] = "self"
        with (
            mock.patch.object(synthetic, "free_memory_of", return_value=20_000),
            mock.patch.object(synthetic.Typist, "_load", side_effect=AssertionError),
        ):
            inputs.refused(
                DamError,
                f"calibration of {inputs.models[0]}: `self` holds the whole model",
                "0.00 GB of cpu are free",
                "name a source with text, set `forward_dtype: bfloat16`",
            )

    def test_a_wrong_option(self, inputs: Inputs) -> None:
        inputs.texts[1] = "self:split=train"
        inputs.refused(ConfigError, f"calibration of {inputs.models[1]}", "`split` is for")

    def test_a_chat_without_a_template(self, inputs: Inputs) -> None:
        inputs.texts[0] = "self:start=chat"
        with mock.patch.object(synthetic.Typist, "_load", side_effect=AssertionError):
            inputs.refused(CalibrationError, "no chat template")

    def test_a_model_that_transformers_cannot_load(self, inputs: Inputs) -> None:
        inputs.texts[0] = "self"
        auto = mock.Mock()
        auto.from_pretrained.side_effect = ImportError("a package is missing\nand more")
        with mock.patch.object(synthetic, "auto_class", return_value=auto):
            inputs.refused(
                CalibrationError,
                f"calibration of {inputs.models[0]}: the model cannot be loaded to write text "
                "(ImportError: a package is missing): name a source with text",
            )


def test_memory_is_that_of_the_model_and_its_batch(inputs: Inputs) -> None:
    inputs.texts[0] = "self:samples=40"
    config = MergeConfiguration.model_validate(inputs.configuration())
    checked = check_configuration(config, None)
    (writing,) = synthetic.writings(checked, False).values()
    model = loaded(inputs.models[0])
    assert writing.parameters == sum(p.numel() for p in model.parameters())
    ids = torch.ones(BATCH, 16, dtype=torch.long)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert writing.kept == held
    assert (writing.tokens, writing.steps) == (640, 3 * 16)


def test_a_plan_counts_the_text_and_writes_none(inputs: Inputs, tmp_path: Path) -> None:
    real = planned_estimate(inventory(tmp_path, inputs.configuration()))
    inputs.texts[0] = "self"
    with mock.patch.object(synthetic.Typist, "__call__", side_effect=AssertionError):
        found = inventory(tmp_path, inputs.configuration())
    own = planned_estimate(found)
    assert [sweep.name for sweep in own.sweeps] == ["text of the models' own", "fit and write"]
    assert own.sweeps[1:] == real.sweeps
    assert own.sweeps[0].certain
    parameters = sum(p.numel() for p in loaded(inputs.models[0]).parameters())
    assert own.sweeps[0].work["writing", "forward"] == 2 * parameters * 4 * 16
    assert own.needs[0].phase == "text of the models' own"
    assert own.needs[0].device == found.writing[0].bytes(torch.float32)
    assert not (tmp_path / "out").exists()


def test_a_plan_says_when_a_model_cannot_be_held(inputs: Inputs, tmp_path: Path) -> None:
    inputs.texts[0] = "self"
    found = inventory(tmp_path, inputs.configuration())
    large = replace(found.writing[0], parameters=10**12)
    own = planned_estimate(replace(found, writing=(large,)))
    assert any("name a source with text in place of `self`" in said for said in own.problems)


@pytest.mark.slow
def test_under_torchrun_the_first_process_writes(
    own_words: Merged, llama_models: Models, tmp_path: Path
) -> None:
    configuration = dam(llama_models.models, ["self"] * 2, base=llama_models.base)
    finish(start_merges({"two": configuration}, tmp_path / "two"))
    for file in kept(own_words, "model_0", "model_1"):
        assert (tmp_path / "two" / "two" / file.name).read_bytes() == file.read_bytes()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
