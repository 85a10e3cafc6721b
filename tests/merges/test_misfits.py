"""A text that does not seem to be its model's is warned of, once the models have read it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from mergekit_dam.calibration.judgement import misfit_of
from mergekit_dam.calibration.load import load_calibration
from mergekit_dam.parameters import RunParameters
from tests.kit.merging import dam, merge
from tests.kit.models import VOCAB_SIZE, make_model, tiny_llama_config
from tests.kit.tokenizers import WORDS, make_tokenizer

SEARCHED: dict[str, Any] = {
    "objective": "layer",
    "metric": "sensitivity",
    "samples": 6,
    "sequence_length": 16,
}


@pytest.fixture(scope="module")
def specialists(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """Two models, each trained on text of its own words, and more text of the same words."""
    root = tmp_path_factory.mktemp("specialists")
    folders, texts = [], []
    for index in range(2):
        read = save_cycles(root / f"read_{index}.jsonl", seed=index, offset=30 * index)
        model = make_model(tiny_llama_config()).train()
        tokens = tokens_of(read, samples=64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(40):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        folder = root / f"model_{index}"
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        folders.append(folder)
        texts.append(save_cycles(root / f"{index}.jsonl", seed=index + 5, offset=30 * index))
    return folders, texts


def save_cycles(path: Path, *, seed: int, offset: int) -> Path:
    """Documents of some words, each of which is always followed by the same one."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(20, (64,), generator=generator).tolist()
    rows = [" ".join(WORDS[offset + (i + n) % 20] for n in range(24)) for i in starts]
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows), encoding="utf-8")
    return path


def tokens_of(text: Path, samples: int) -> torch.Tensor:
    return load_calibration(
        str(text),
        model="m",
        tokenizer=make_tokenizer(),
        samples=samples,
        sequence_length=16,
        vocab_size=VOCAB_SIZE,
        seed=0,
    ).tokens


def warnings_in(report: dict[str, Any]) -> list[str]:
    every = [said for own in report["calibration"].values() for said in own["warnings"]]
    return [said for said in every if "own loss" in said]


def test_each_models_own_text_gives_no_warning_and_its_loss_is_told(
    specialists: tuple[list[Path], list[Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models, texts = specialists
    report = merge(dam(models, texts, **SEARCHED), tmp_path / "out").report
    assert warnings_in(report) == []
    assert "own loss" not in caplog.text
    for index, told in enumerate(report["text_losses"].values()):
        tokens = tokens_of(texts[index], samples=6)[-RunParameters().held_out(6) :]
        model = make_model(tiny_llama_config())
        model = type(model).from_pretrained(models[index], dtype=torch.float32)
        with torch.no_grad():
            logits = model(tokens).logits
        expected = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert told["own"] == pytest.approx(float(expected), rel=1e-4)
        assert told["own"] < told["start"]


def test_the_text_of_another_model_is_warned_of_in_log_and_report(
    specialists: tuple[list[Path], list[Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models, texts = specialists
    merged = merge(dam(models, texts[::-1], **SEARCHED), tmp_path / "out")
    said = warnings_in(merged.report)
    assert len(said) == 2
    for warning in said:
        assert warning.startswith("the model's own loss on this text is")
        assert warning in caplog.text


def test_text_that_models_share_is_no_models_own(
    specialists: tuple[list[Path], list[Path]], tmp_path: Path
) -> None:
    models, texts = specialists
    report = merge(dam(models, [texts[0]] * 2, **SEARCHED), tmp_path / "out").report
    assert warnings_in(report) == []


@pytest.mark.parametrize(
    ("own", "start", "said"),
    [
        (2.0, 2.3, None),
        (2.0, 1.97, None),  # too near to tell
        (2.0, 1.9, "Is it the text of another model?"),
        (9.0, 9.5, "is 9 nats per token, and that of a guess among its 10,000 tokens is 9.21"),
    ],
)
def test_a_loss_like_a_guess_or_above_the_starts_is_warned_of(
    own: float, start: float, said: str | None
) -> None:
    found = misfit_of(own, start, 10_000)
    assert found is None if said is None else found is not None and said in found
