"""Two models with different vocabularies, and text in the words of each.

Two models, `left` and `right`: each knows 16 words, half of which the other knows too, by other
ids; their special tokens have other ids as well, and their embeddings other numbers of rows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from mergekit_dam.coefficients.file import CoefficientFile
from tests.kit.merging import Merged, dam
from tests.kit.models import ARCHITECTURES, fine_tune, make_model
from tests.kit.texts import save_text
from tests.kit.tokenizers import word_tokenizer

# Of one length, so that no word is found in another: an added token is cut out of any text.
SHARED = ("aba", "abe", "abi", "abo", "abu", "aca", "ace", "aci")
LEFT = ("fob", "fod", "fog", "fol", "fom", "fon", "fop", "fot")
RIGHT = ("gub", "gud", "gug", "gul", "gum", "gun", "gup", "gut")
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
LEFT_VOCABULARY = (*SPECIAL, *SHARED, *LEFT)
RIGHT_VOCABULARY = (*RIGHT, *reversed(SHARED), *reversed(SPECIAL))
LENGTH = 16


@dataclass(frozen=True)
class Pair:
    """The two models, and text in the words of each."""

    models: tuple[Path, Path]
    texts: tuple[Path, Path]
    shared: Path

    def dam(self, tokenizer: Mapping[str, Any] | None = None, **parameters: Any) -> dict[str, Any]:
        """A configuration; by default, with the union of both vocabularies."""
        settings = {"tokenizer": dict(tokenizer or {"source": "union"})}
        return dam(self.models, self.texts, settings=settings, **parameters)


def save_pair(folder: Path, architecture: str = "llama") -> Pair:
    """Write the models, fine-tunes of one base in all but their vocabularies, and their texts."""
    words = sorted({*LEFT_VOCABULARY, *RIGHT_VOCABULARY})
    config = ARCHITECTURES[architecture]()
    config.vocab_size = len(words)
    base = make_model(config)
    models = []
    for index, vocabulary in enumerate((LEFT_VOCABULARY, RIGHT_VOCABULARY)):
        tokenizer = word_tokenizer(vocabulary)
        config.vocab_size = (24, 26)[index]
        for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, special, getattr(tokenizer, special))
        model = make_model(config)
        places = torch.tensor([words.index(word) for word in vocabulary])
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                whole = base.get_parameter(name)
                if tensor.shape == whole.shape:
                    tensor.copy_(whole)
                else:
                    tensor[: len(vocabulary)] = whole[places]
        fine_tune(model, seed=index + 1, scale=0.3)
        path = folder / ("left", "right")[index]
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        models.append(path)
    texts = (
        save_text(folder / "left.jsonl", LEFT_VOCABULARY[4:], seed=0),
        save_text(folder / "right.jsonl", RIGHT_VOCABULARY[:16], seed=1),
    )
    return Pair((models[0], models[1]), texts, save_text(folder / "shared.jsonl", SHARED, seed=2))


def one_hot(merged: Merged, source: int, path: Path) -> Path:
    """Coefficients that take everything of one source."""
    fitted = merged.coefficients
    rows = {name: torch.zeros_like(own) for name, own in fitted.coefficients.items()}
    for own in rows.values():
        own[source] = 1
    path.mkdir()
    CoefficientFile(rows, fitted.sources, fitted.metadata).save(
        path / "dam_coefficients.safetensors"
    )
    return path


def lines_of(text: Path) -> list[str]:
    return [json.loads(line)["text"] for line in text.read_text("utf-8").splitlines()]


def ids_of(model: Path, lines: Sequence[str]) -> Tensor:
    """Equal numbers of words make equal numbers of ids, int64 `[lines, words]`."""
    return torch.tensor(AutoTokenizer.from_pretrained(model)(list(lines))["input_ids"])


def own_columns(model: Path, merged: Path) -> Tensor:
    """For every token of a model, in the order of its ids, its id in the merged model."""
    own = AutoTokenizer.from_pretrained(model).get_vocab()
    new = AutoTokenizer.from_pretrained(merged).get_vocab()
    return torch.tensor([new[token] for token in sorted(own, key=own.__getitem__)])
