"""Bad input to a whole merge: what it says, and that it says so before a weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, T5Config, T5ForConditionalGeneration

from mergekit_dam.errors import ArchitectureError, CalibrationError, ConfigError, DamError
from tests.merging import dam, merge, watched_reads
from tests.models import (
    ARCHITECTURES,
    Models,
    make_model,
    make_tokenizer,
    save_calibration,
    tiny_llama_config,
)


@dataclass
class Case:
    """A merge that is right but for what a test changes.

    Attributes:
        folder: to write into.
        models, base, texts: to be named in the configuration.
        options: of mergekit.
    """

    folder: Path
    models: list[Path]
    base: Path
    texts: list[Any]
    options: dict[str, Any] = field(default_factory=dict)

    def configuration(self, **parameters: Any) -> dict[str, Any]:
        return dam(self.models, self.texts, **{"head": False, **parameters})

    def text(self, content: str, name: str = "text.jsonl") -> Path:
        """Write a file for the first model, and take it for its calibration."""
        path = self.folder / name
        path.write_text(content, encoding="utf-8")
        self.texts[0] = path
        return path

    def own_model(self, index: int = 1) -> Path:
        """A copy of a model, to be changed."""
        copy = self.folder / f"own_{index}"
        shutil.copytree(self.models[index], copy)
        self.models[index] = copy
        return copy

    def other_model(self, config: PretrainedConfig, index: int = 1) -> Path:
        """Another model in the place of one."""
        self.models[index] = self.folder / "other"
        make_model(config).save_pretrained(self.models[index])
        make_tokenizer().save_pretrained(self.models[index])
        return self.models[index]

    def refused(
        self, kind: type[DamError], *messages: str, configuration: dict[str, Any] | None = None
    ) -> None:
        """Assert how the merge fails: before a weight is read, and with no folder left."""
        out = self.folder / "out"
        with watched_reads() as reads, pytest.raises(kind) as error:
            merge(configuration or self.configuration(), out, **self.options)
        assert type(error.value) is kind
        for message in messages:
            assert message in error.value.message
        assert reads.order == []
        assert not out.exists()


@pytest.fixture
def case(llama_models: Models, calibration: tuple[Path, Path], tmp_path: Path) -> Case:
    return Case(tmp_path, list(llama_models.models), llama_models.base, list(calibration))


def test_the_case_itself_is_right(case: Case) -> None:
    merge(case.configuration(), case.folder / "out")


class TestCalibration:
    def test_missing_file(self, case: Case) -> None:
        case.texts[0] = case.folder / "gone.jsonl"
        where = f"calibration of {case.models[0]}: '{case.folder}/gone.jsonl'"
        case.refused(CalibrationError, where, "no file or directory at")

    def test_empty_file(self, case: Case) -> None:
        path = case.text("")
        case.refused(CalibrationError, f"'{path}' holds no text (0 empty documents)")

    def test_nothing_but_empty_documents(self, case: Case) -> None:
        case.text('{"text": ""}\n{"text": "  "}\n')
        case.refused(CalibrationError, "holds no text (2 empty documents)")

    def test_folder_without_text(self, case: Case) -> None:
        folder = case.folder / "empty"
        folder.mkdir()
        case.texts[0] = folder
        case.refused(CalibrationError, f"the directory {folder} holds no .txt")

    def test_wrong_column(self, case: Case) -> None:
        case.texts[0] = f"{case.texts[0]}:column=txet"
        case.refused(CalibrationError, "line 1 has no column 'txet'", "did you mean `column=text`?")

    def test_no_known_column(self, case: Case) -> None:
        path = case.text('{"body": "one"}')
        case.refused(CalibrationError, f"{path} line 1 has none of the columns", "'body'")

    def test_bad_json_line_with_its_number(self, case: Case) -> None:
        path = case.text('{"text": "one two"}\n{"text": "three"}\n{"text": }\n')
        case.refused(CalibrationError, f"{path} line 3 is not JSON: Expecting value at column 10")

    def test_not_utf8(self, case: Case) -> None:
        path = case.text("")
        path.write_bytes(b'{"text": "caf\xe9"}')
        case.refused(CalibrationError, f"{path} line 1 is not UTF-8 text")

    def test_unread_suffix(self, case: Case) -> None:
        case.text("one,two", "text.csv")
        case.refused(CalibrationError, "'.csv' files are not read; convert to one of .txt")

    def test_unknown_option(self, case: Case) -> None:
        case.texts[0] = f"{case.texts[0]}:sample=4"
        case.refused(CalibrationError, "unknown option 'sample'; did you mean `samples`?")

    def test_too_little_text(self, case: Case) -> None:
        path = case.text('{"text": "one two three four"}\n' * 4)
        case.refused(
            CalibrationError,
            "4 sequences of 16 tokens (64 tokens) are needed",
            f"'{path}' holds 20 tokens in 4 documents, which are 1 full sequences",
            "`samples: 1`",
        )

    def test_token_ids_outside_the_vocabulary(self, case: Case) -> None:
        path = case.text(json.dumps({"input_ids": [5, 64, 6]}))
        case.refused(
            CalibrationError, f"{path} line 1: token id 64 is outside the model's vocabulary of 64"
        )

    def test_text_with_tokens_outside_the_vocabulary(self, case: Case) -> None:
        model = case.own_model(0)
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([f"new{index}" for index in range(64 - len(tokenizer) + 1)])
        tokenizer.save_pretrained(model)
        last = tokenizer.convert_ids_to_tokens(64)
        case.text(json.dumps({"text": f"one {last} two"}))
        case.refused(CalibrationError, f"token '{last}' (id 64) is outside the model's vocabulary")

    def test_tokens_that_the_merged_model_loses(self, case: Case) -> None:
        model = case.own_model(1)
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["alpha"])
        tokenizer.save_pretrained(model)
        case.texts[1] = case.folder / "alpha.jsonl"
        case.texts[1].write_text(json.dumps({"text": "alpha one " * 50}))
        configuration = {**case.configuration(), "tokenizer": {"source": "base"}}
        case.refused(
            CalibrationError,
            f"calibration of {model}: its text has 1 tokens (alpha)",
            f"gets the tokenizer of {case.models[0]}; write `tokenizer: {{source: union}}`",
            configuration=configuration,
        )

    def test_tokens_that_truncation_cuts_off(self, case: Case) -> None:
        case.other_model(tiny_llama_config(vocab_size=66))
        case.texts[1] = case.folder / "ids.jsonl"
        case.texts[1].write_text(json.dumps({"input_ids": [64, 5] * 40}))
        case.options["unsafe_truncate_embeddings"] = True
        case.refused(CalibrationError, "--unsafe-truncate-embeddings leaves 64 ids")

    def test_chat_without_a_template(self, case: Case) -> None:
        path = case.text(json.dumps({"messages": [{"role": "user", "content": "one"}]}))
        case.refused(CalibrationError, f"{path} line 1 holds chat messages", "no chat template")

    def test_sequences_longer_than_the_models_positions(self, case: Case) -> None:
        configuration = case.configuration(sequence_length=65, samples=1)
        case.refused(
            CalibrationError,
            "`sequence_length` is 65, but the model has 64 positions; set `sequence_length: 64`",
            configuration=configuration,
        )


class TestTokenizers:
    def test_missing(self, case: Case) -> None:
        model = case.own_model()
        for file in model.glob("tokenizer*"):
            file.unlink()
        case.refused(CalibrationError, f"the tokenizer of {model} cannot be loaded")

    def test_that_disagree(self, case: Case) -> None:
        model = case.own_model()
        file = model / "tokenizer.json"
        content = json.loads(file.read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
        file.write_text(json.dumps(content))
        case.refused(
            CalibrationError,
            "their tokenizers disagree",
            f"{case.models[0]} and {model}: 2 tokens differ",
            "'cat' in one, 'dog' in the other",
        )

    def test_of_the_base_disagrees(self, case: Case) -> None:
        base = case.folder / "base"
        shutil.copytree(case.base, base)
        file = base / "tokenizer.json"
        file.write_text(file.read_text().replace('"cat"', '"lion"'))
        configuration = {**case.configuration(), "base_model": str(base)}
        case.refused(
            CalibrationError, "'lion' in one, 'cat' in the other", configuration=configuration
        )

    @pytest.mark.parametrize("number", [0, 1])
    def test_missing_of_a_union(self, case: Case, number: int) -> None:
        model = case.own_model(number)
        for file in model.glob("tokenizer*"):
            file.unlink()
        case.refused(
            CalibrationError,
            f"the tokenizer of {model} cannot be loaded",
            configuration={**case.configuration(), "tokenizer": {"source": "union"}},
        )

    def test_to_take_is_missing(self, case: Case) -> None:
        configuration = {
            **case.configuration(),
            "tokenizer": {"source": str(case.folder / "nothing")},
        }
        case.refused(
            CalibrationError,
            f"the tokenizer of {case.folder}/nothing cannot be loaded",
            configuration=configuration,
        )


class TestConfiguration:
    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"sampels": 4}, "unknown parameter `sampels`; did you mean `samples`?"),
            ({"density": 0.5}, "`density` is a parameter of"),
            ({"samples": 0}, "`samples` is 0: input should be greater than 0"),
            ({"samples": [4, 8]}, "`samples` takes one value for the whole merge"),
            ({"ridge": 0}, "`ridge` is 0: input should be greater than 0"),
            ({"holdout": 1}, "`holdout` is 1: input should be less than 1"),
            (
                {"granularity": "row"},
                "`granularity` is 'row': input should be 'column' or 'tensor'",
            ),
            ({"include_base": True}, "`include_base` is true, but the configuration names no"),
            ({"weight": 0}, "every model has `weight: 0`"),
            (
                {"loss_weight": [{"filter": "mlp", "value": 0}, {"value": 1}]},
                "model.layers.0.mlp.up_proj.weight: every model has `loss_weight: 0`",
            ),
            ({"loss_weight": 0}, "every model has `loss_weight: 0`"),
            ({"coefficients": "gone"}, "coefficients: no file at gone"),
            ({"steps": 8}, "`objective: layer` takes no `steps`"),
        ],
    )
    def test_parameters(self, case: Case, parameters: dict[str, Any], message: str) -> None:
        case.refused(ConfigError, message, configuration=case.configuration(**parameters))

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"start": "avarage"}, "start: required `average`, `random`, or the path of"),
            ({"metric": "identity"}, "`objective: logits` takes no `metric`"),
            ({"weighted_overlap": 1}, "the configuration names no `base_model` to take task"),
            ({"nonlinearity": "sigmoid"}, "`nonlinearity: sigmoid` has no start"),
            (
                {"nonlinearity": "sigmoid", "sum_to_one": [{"filter": "mlp", "value": False}]},
                "model.embed_tokens.weight: nonlinearity: sigmoid can only give coefficients "
                "between 0 and 1, got one that starts at 0; use `nonlinearity: none`",
            ),
        ],
    )
    def test_parameters_of_the_objective_logits(
        self, case: Case, parameters: dict[str, Any], message: str
    ) -> None:
        configuration = case.configuration(objective="logits", **parameters)
        case.refused(ConfigError, message, configuration=configuration)

    def test_a_start_that_weights_put_out_of_reach(self, case: Case) -> None:
        configuration = case.configuration(
            objective="logits", nonlinearity="tanh", sum_to_one=False
        )
        configuration["models"][1]["parameters"]["weight"] = 0
        case.refused(
            ConfigError,
            "model.embed_tokens.weight: nonlinearity: tanh can only give coefficients between -1 "
            "and 1, got one that starts at 1",
            configuration=configuration,
        )

    def test_a_start_of_another_form(self, case: Case) -> None:
        merge(case.configuration(granularity="column"), case.folder / "first")
        configuration = case.configuration(
            objective="logits", start=str(case.folder / "first"), granularity="tensor"
        )
        case.refused(
            ConfigError,
            "start: the file has one coefficient a column for model.",
            "but `granularity` is `tensor`; set `granularity: column`, or another start",
            configuration=configuration,
        )

    def test_a_start_of_other_models(self, case: Case) -> None:
        merge(case.configuration(), case.folder / "first")
        configuration = case.configuration(objective="logits", start=str(case.folder / "first"))
        configuration["base_model"] = str(case.base)
        case.refused(ConfigError, "start: made from 2 models", "got 3", configuration=configuration)

    def test_every_problem_is_told_at_once(self, case: Case) -> None:
        configuration = case.configuration(sampels=4, ridge=-1)
        configuration["models"][0]["parameters"]["granularity"] = "tensor"
        case.refused(
            ConfigError,
            "3 problems in the dam configuration",
            "`sampels`",
            "`ridge` is -1",
            f"models[0] ({case.models[0]}): `granularity` belongs to the merged tensor",
            configuration=configuration,
        )

    def test_missing_calibration(self, case: Case) -> None:
        case.texts[1] = None
        case.refused(ConfigError, f"{case.models[1]}: required `calibration`", "add `parameters:")

    def test_parameters_of_a_base_that_is_not_merged(self, case: Case) -> None:
        case.models.append(case.base)
        case.texts.append(case.texts[0])
        configuration = {**case.configuration(), "base_model": str(case.base)}
        case.refused(
            ConfigError,
            "the base takes no `calibration`; set `include_base: true`",
            configuration=configuration,
        )

    def test_a_model_listed_twice(self, case: Case) -> None:
        case.models[1] = case.models[0]
        case.refused(ConfigError, f"models: {case.models[0]} is listed 2 times")

    def test_nothing_but_the_base(self, case: Case) -> None:
        configuration = {"merge_method": "dam", "base_model": str(case.base)}
        configuration |= {"models": [{"model": str(case.base)}]}  # type: ignore[dict-item]
        case.refused(
            ConfigError,
            "1 problem in the dam configuration",
            "required at least one model besides the base",
            configuration=configuration,
        )

    def test_slices_of_models_without_the_base(self, case: Case) -> None:
        configuration = case.configuration()
        models = configuration.pop("models")
        both = [{**entry, "layer_range": [0, 1]} for entry in models]
        base = {"model": str(case.base), "layer_range": [0, 1]}
        configuration["base_model"] = str(case.base)
        configuration["slices"] = [{"sources": [*both, base]}, {"sources": both}]
        case.refused(
            ConfigError,
            f"slices[1]: {case.models[0]} and {case.models[1]} are merged without the base",
            configuration=configuration,
        )

    def test_coefficients_that_no_dam_merge_wrote(self, case: Case) -> None:
        path = case.models[0] / "model.safetensors"
        case.refused(
            ConfigError,
            f"coefficients: {path} was not written by a dam merge",
            configuration=case.configuration(coefficients=str(path)),
        )
        case.refused(
            ConfigError,
            f"start: {path} was not written by a dam merge",
            configuration=case.configuration(objective="logits", start=str(path)),
        )


class TestModels:
    def test_missing_folder(self, case: Case) -> None:
        case.models[1] = case.folder / "nothing"
        case.refused(CalibrationError, f"the tokenizer of {case.models[1]} cannot be loaded")

    def test_tensors_of_other_shapes(self, case: Case) -> None:
        model = case.other_model(tiny_llama_config(intermediate_size=32))
        case.refused(
            ArchitectureError,
            "model.layers.0.mlp.up_proj.weight: shapes differ",
            f"{model} [32, 16]",
            "and 1 more",
        )

    def test_vocabularies_of_other_sizes(self, case: Case) -> None:
        case.other_model(tiny_llama_config(vocab_size=66))
        case.refused(
            ArchitectureError,
            "model.embed_tokens.weight: shapes differ",
            "write `tokenizer: {source: union}`, or pass --unsafe-truncate-embeddings",
        )

    def test_missing_tensor(self, case: Case) -> None:
        model = case.own_model()
        file = model / "model.safetensors"
        tensors = load_file(file)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
        message = f"model.layers.1.mlp.up_proj.weight: {model} has not"
        case.refused(ArchitectureError, message)

    def test_layers_outside_of_a_model(self, case: Case) -> None:
        configuration = case.configuration()
        models = configuration.pop("models")
        configuration["slices"] = [
            {"sources": [{**entry, "layer_range": [1, 3]} for entry in models]}
        ]
        case.refused(
            ConfigError,
            f"slices[0]: `layer_range` is [1, 3], but {case.models[0]} has ",
            configuration=configuration,
        )

    def test_encoder_and_decoder(self, case: Case) -> None:
        config = T5Config(
            vocab_size=64,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
        for index in range(2):
            torch.manual_seed(index)
            case.models[index] = case.folder / str(index)
            T5ForConditionalGeneration(config).save_pretrained(case.models[index])
            make_tokenizer().save_pretrained(case.models[index])
        case.refused(
            ArchitectureError,
            "got T5ForConditionalGeneration (model type t5): AutoModelForSeq2SeqLM loads it",
        )

    def test_another_architecture_by_force(self, case: Case) -> None:
        case.other_model(ARCHITECTURES["qwen3"]())
        case.options["allow_crimes"] = True
        case.refused(
            ArchitectureError,
            "mergekit plans no tensor for model.layers.0.self_attn.q_norm.weight",
            "which Qwen3ForCausalLM needs",
        )

    def test_a_head_of_its_own_beside_a_tied_first_model(self, case: Case) -> None:
        case.other_model(tiny_llama_config(tie_word_embeddings=True), 0)
        case.refused(ArchitectureError, f"{case.models[1]} has an output head of its own")


class TestWeights:
    """What only shows when weights are read; the tensor or the block is named all the same."""

    @pytest.fixture(params=[float("nan"), float("inf")])
    def broken(self, case: Case, request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
        def break_tensor(name: str) -> None:
            file = case.own_model() / "model.safetensors"
            tensors = load_file(file)
            tensors[name][0, 0] = request.param
            save_file(tensors, file, metadata={"format": "pt"})

        yield break_tensor

    @pytest.mark.parametrize(
        ("name", "place"),
        [
            ("model.layers.0.self_attn.q_proj.weight", "block 1/2"),
            ("model.layers.1.mlp.down_proj.weight", "block 2/2"),
            ("lm_head.weight", "output: lm_head.weight: required a finite loss"),
        ],
    )
    def test_that_are_not_finite(
        self, case: Case, broken: Callable[[str], None], name: str, place: str
    ) -> None:
        broken(name)
        with pytest.raises(DamError, match="not finite") as error:
            merge(case.configuration(head=True), case.folder / "out")
        assert place in error.value.message
        assert not (case.folder / "out").exists()

    @pytest.mark.parametrize("objective", ["layer", "logits"])
    @pytest.mark.parametrize(
        ("name", "place"),
        [("model.layers.1.mlp.down_proj.weight", "block 2/2"), ("lm_head.weight", "output")],
    )
    def test_that_are_not_finite_in_a_search(
        self, case: Case, broken: Callable[[str], None], name: str, place: str, objective: str
    ) -> None:
        broken(name)
        more = {"metric": "sensitivity"} if objective == "layer" else {}
        with pytest.raises(DamError, match=f"^{place}: what leaves it is not finite"):
            merge(case.configuration(objective=objective, **more), case.folder / "out")
        assert not (case.folder / "out").exists()

    def test_a_ridge_too_small_to_solve_with(self, case: Case) -> None:
        configuration = case.configuration(ridge=1e-300, sum_to_one=False)
        with pytest.raises(DamError, match=r"block 1/2: .*`ridge` is too small"):
            merge(configuration, case.folder / "out")

    def test_of_an_earlier_merge_stay_when_the_next_fails(self, case: Case) -> None:
        out = case.folder / "out"
        first = merge(case.configuration(), out)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        (out / "notes.txt").write_text("mine")
        with pytest.raises(DamError):
            merge(case.configuration(ridge=1e-300, sum_to_one=False), out)
        assert {path.name for path in out.iterdir()} == {*before, "notes.txt"}
        assert first.model_bytes == before["model.safetensors"]


def test_a_text_may_be_shared(case: Case) -> None:
    case.texts = [save_calibration(case.folder / "both.jsonl")] * 2
    merge(case.configuration(), case.folder / "out")
