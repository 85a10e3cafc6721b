"""Bad calibration text: each is refused before a weight is read."""

from __future__ import annotations

import json

from mergekit_dam.errors import CalibrationError
from tests.kit.cases import Case
from tests.kit.merging import merge
from tests.kit.models import make_tokenizer, save_calibration, tiny_llama_config


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


def test_a_text_may_be_shared(case: Case) -> None:
    case.texts = [save_calibration(case.folder / "both.jsonl")] * 2
    merge(case.configuration(), case.folder / "out")
