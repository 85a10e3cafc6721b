"""Merges of models whose special tokens differ."""

import json
from pathlib import Path

import pytest
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from transformers import AutoTokenizer

from mergekit_dam.errors import CalibrationError
from mergekit_dam.host.prepare import prepare
from tests.kit.merging import dam, merge
from tests.kit.models import make_model, tiny_llama_config
from tests.kit.texts import calibration_tokens, save_text
from tests.kit.tokenizers import WORDS, make_tokenizer
from tests.kit.vocabularies import lines_of


class TestSpecialTokens:
    def save(self, folder: Path, seed: int, turn: str, end: str | None = None) -> Path:
        """A model with a reserved token (or two), and chats that begin with the first."""
        model = make_model(tiny_llama_config(), seed=seed)
        tokenizer = make_tokenizer()
        tokens = [turn] if end is None else [end, turn]
        tokenizer.add_tokens(tokens, special_tokens=True)
        tokenizer.chat_template = (
            "{% for message in messages %}"
            + turn
            + "{{ message['content'] }}"
            + (end or "")
            + "{% endfor %}"
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    def save_chats(self, path: Path) -> Path:
        """Two messages of four words each, a line."""
        words = save_text(path.with_suffix(".txt"), WORDS, seed=3)
        messages = [
            [{"role": "user", "content": " ".join(line.split()[i : i + 4])} for i in (0, 4)]
            for line in lines_of(words)
        ]
        path.write_text("\n".join(json.dumps({"messages": own}) for own in messages), "utf-8")
        return path

    def test_a_reserved_one_may_have_another_name(self, tmp_path: Path) -> None:
        base = self.save(tmp_path / "base", 0, "<reserved>")
        chat = self.save(tmp_path / "chat", 1, "<turn>")
        texts = [save_text(tmp_path / "plain.jsonl", WORDS), self.save_chats(tmp_path / "c.jsonl")]
        merged = merge(dam([base, chat], texts), tmp_path / "out", copy_tokenizer=False)
        merged.load()
        assert not (merged.path / "tokenizer.json").exists()
        texts[0] = texts[1]
        with pytest.raises(CalibrationError, match="'<reserved>' in one, '<turn>' in the other"):
            merge(dam([base, chat], texts), tmp_path / "refused")

    def test_every_chat_is_written_by_its_own_template(self, tmp_path: Path) -> None:
        models = [
            self.save(tmp_path / "one", 0, "<turn>"),
            self.save(tmp_path / "two", 1, "<turn>", "<end>"),
        ]
        texts = [self.save_chats(tmp_path / "a.jsonl"), self.save_chats(tmp_path / "b.jsonl")]
        configuration = dam(models, texts, settings={"tokenizer": {"source": "union"}})
        merged = merge(configuration, tmp_path / "out")
        tokenizer = AutoTokenizer.from_pretrained(merged.path)
        assert tokenizer.chat_template == AutoTokenizer.from_pretrained(models[0]).chat_template
        config = MergeConfiguration.model_validate(configuration)
        prepared = prepare(config, MergeOptions(quiet=True))
        for index, (model, text) in enumerate(zip(models, texts, strict=True)):
            own = AutoTokenizer.from_pretrained(model)
            made = calibration_tokens(text, own, samples=4).flatten().tolist()
            words = own.convert_ids_to_tokens(made)
            found = list(prepared.calibration.values())[index].tokens.flatten().tolist()
            assert tokenizer.convert_ids_to_tokens(found) == words
            assert "<turn>" in words
            assert ("<end>" in words) is (index == 1)
