"""Bad calibration text: each is refused before a weight is read."""

import json

from mergekit_dam.errors import CalibrationError, ConfigError
from tests.kit.inputs import Inputs
from tests.kit.merging import merge
from tests.kit.models import tiny_llama_config
from tests.kit.texts import save_calibration
from tests.kit.tokenizers import make_tokenizer


def test_the_inputs_are_right_before_a_test_spoils_them(inputs: Inputs) -> None:
    merge(inputs.configuration(), inputs.folder / "out")


class TestCalibration:
    def test_missing_file(self, inputs: Inputs) -> None:
        inputs.texts[0] = inputs.folder / "gone.jsonl"
        where = f"calibration of {inputs.models[0]}: '{inputs.folder}/gone.jsonl'"
        inputs.refused(ConfigError, where, "no file or directory at")

    def test_empty_file(self, inputs: Inputs) -> None:
        path = inputs.text("")
        inputs.refused(CalibrationError, f"'{path}' holds no text (0 empty documents)")

    def test_nothing_but_empty_documents(self, inputs: Inputs) -> None:
        inputs.text('{"text": ""}\n{"text": "  "}\n')
        inputs.refused(CalibrationError, "holds no text (2 empty documents)")

    def test_folder_without_text(self, inputs: Inputs) -> None:
        folder = inputs.folder / "empty"
        folder.mkdir()
        inputs.texts[0] = folder
        inputs.refused(ConfigError, f"the directory {folder} holds no .txt")

    def test_wrong_column(self, inputs: Inputs) -> None:
        inputs.texts[0] = f"{inputs.texts[0]}:column=txet"
        inputs.refused(
            CalibrationError, "line 1 has no column 'txet'", "did you mean `column=text`?"
        )

    def test_no_known_column(self, inputs: Inputs) -> None:
        path = inputs.text('{"body": "one"}')
        inputs.refused(CalibrationError, f"{path} line 1 has none of the columns", "'body'")

    def test_bad_json_line_with_its_number(self, inputs: Inputs) -> None:
        path = inputs.text('{"text": "one two"}\n{"text": "three"}\n{"text": }\n')
        inputs.refused(CalibrationError, f"{path} line 3 is not JSON: Expecting value at column 10")

    def test_not_utf8(self, inputs: Inputs) -> None:
        path = inputs.text("")
        path.write_bytes(b'{"text": "caf\xe9"}')
        inputs.refused(CalibrationError, f"{path} line 1 is not UTF-8 text")

    def test_unread_suffix(self, inputs: Inputs) -> None:
        inputs.text("one,two", "text.xlsx")
        inputs.refused(ConfigError, "'.xlsx' files are not read; convert to one of .txt")

    def test_unknown_option(self, inputs: Inputs) -> None:
        inputs.texts[0] = f"{inputs.texts[0]}:sample=4"
        inputs.refused(ConfigError, "unknown option 'sample'; did you mean `samples`?")

    def test_too_little_text(self, inputs: Inputs) -> None:
        path = inputs.text('{"text": "one two three four"}\n' * 4)
        inputs.refused(
            CalibrationError,
            "4 sequences of 16 tokens (64 tokens) are needed",
            f"'{path}' holds 20 tokens in 4 documents, which are 1 full sequences",
            "`samples: 1`",
        )

    def test_token_ids_outside_the_vocabulary(self, inputs: Inputs) -> None:
        path = inputs.text(json.dumps({"input_ids": [5, 64, 6]}))
        inputs.refused(
            CalibrationError, f"{path} line 1: token id 64 is outside the model's vocabulary of 64"
        )

    def test_text_with_tokens_outside_the_vocabulary(self, inputs: Inputs) -> None:
        model = inputs.own_model(0)
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([f"new{index}" for index in range(64 - len(tokenizer) + 1)])
        tokenizer.save_pretrained(model)
        last = tokenizer.convert_ids_to_tokens(64)
        inputs.text(json.dumps({"text": f"one {last} two"}))
        inputs.refused(
            CalibrationError, f"token '{last}' (id 64) is outside the model's vocabulary"
        )

    def test_tokens_that_the_merged_model_loses(self, inputs: Inputs) -> None:
        model = inputs.own_model(1)
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["alpha"])
        tokenizer.save_pretrained(model)
        inputs.texts[1] = inputs.folder / "alpha.jsonl"
        inputs.texts[1].write_text(json.dumps({"text": "alpha one " * 50}))
        configuration = {**inputs.configuration(), "tokenizer": {"source": "base"}}
        inputs.refused(
            CalibrationError,
            f"calibration of {model}: its text has 1 tokens (alpha)",
            f"gets the tokenizer of {inputs.models[0]}; write `tokenizer: {{source: union}}`",
            configuration=configuration,
        )

    def test_tokens_that_truncation_cuts_off(self, inputs: Inputs) -> None:
        inputs.other_model(tiny_llama_config(vocab_size=66))
        inputs.texts[1] = inputs.folder / "ids.jsonl"
        inputs.texts[1].write_text(json.dumps({"input_ids": [64, 5] * 40}))
        inputs.options["unsafe_truncate_embeddings"] = True
        inputs.refused(CalibrationError, "--unsafe-truncate-embeddings leaves 64 ids")

    def test_chat_without_a_template(self, inputs: Inputs) -> None:
        path = inputs.text(json.dumps({"messages": [{"role": "user", "content": "one"}]}))
        inputs.refused(CalibrationError, f"{path} line 1 holds chat messages", "no chat template")

    def test_sequences_longer_than_the_models_positions(self, inputs: Inputs) -> None:
        configuration = inputs.configuration(sequence_length=65, samples=1)
        inputs.refused(
            CalibrationError,
            "`sequence_length` is 65, but the model has 64 positions; set `sequence_length: 64`",
            configuration=configuration,
        )


def test_a_text_may_be_shared(inputs: Inputs) -> None:
    inputs.texts = [save_calibration(inputs.folder / "both.jsonl")] * 2
    merge(inputs.configuration(), inputs.folder / "out")
