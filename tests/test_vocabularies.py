"""Merges of models whose tokenizers differ, through mergekit's own entry point, to the end.

Two models, `left` and `right`: each knows 16 words, half of which the other knows too, by other
ids; their special tokens have other ids as well, and their embeddings other numbers of rows.
"""

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mergekit_dam.calibration.load import load_calibration
from mergekit_dam.coefficients.file import CoefficientFile
from mergekit_dam.demo.training import train_tokenizer
from mergekit_dam.errors import CalibrationError, ConfigError
from mergekit_dam.estimate.inventory import take_inventory
from mergekit_dam.estimate.merge import plan_merge
from mergekit_dam.evaluate import EvaluationSettings, evaluate
from mergekit_dam.request.prepare import prepare
from tests.merging import Merged, dam, merge, tensors_of, watched_reads
from tests.models import (
    ARCHITECTURES,
    VOCABULARY,
    WORDS,
    Models,
    fine_tune,
    make_model,
    make_tokenizer,
    tiny_llama_config,
)
from tests.test_distributed import difference, torchrun

# Of one length, so that no word is found in another: an added token is cut out of any text.
SHARED = ("aba", "abe", "abi", "abo", "abu", "aca", "ace", "aci")
LEFT = ("fob", "fod", "fog", "fol", "fom", "fon", "fop", "fot")
RIGHT = ("gub", "gud", "gug", "gul", "gum", "gun", "gup", "gut")
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
LEFT_VOCABULARY = (*SPECIAL, *SHARED, *LEFT)
RIGHT_VOCABULARY = (*RIGHT, *reversed(SHARED), *reversed(SPECIAL))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LENGTH = 16


def word_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word; begins every text with <s>."""
    ids = {word: index for index, word in enumerate(vocabulary)}
    backend = Tokenizer(tokenizer_models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", ids["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def save_text(path: Path, words: Sequence[str], seed: int = 0) -> Path:
    """Documents of random words, some of them more often than others."""
    generator = torch.Generator().manual_seed(seed)
    chances = 1.0 / torch.arange(1, len(words) + 1)
    drawn = torch.multinomial(chances, 64 * 24, replacement=True, generator=generator)
    lines = [" ".join(words[i] for i in row) for row in drawn.reshape(64, 24).tolist()]
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
    return path


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


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def union(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    """Both vocabularies in one, and layers fitted."""
    return merge(pair.dam(), tmp_path_factory.mktemp("union") / "out")


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


@torch.no_grad()
def logits(model: Path, tokens: Tensor) -> Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found: Tensor = loaded(input_ids=tokens).logits
    return found


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


class TestUnion:
    def test_it_holds_every_token_once_and_the_base_keeps_its_ids(
        self, pair: Pair, union: Merged
    ) -> None:
        vocabulary = AutoTokenizer.from_pretrained(union.path).get_vocab()
        assert vocabulary.keys() == {*LEFT_VOCABULARY, *RIGHT_VOCABULARY}
        assert sorted(vocabulary.values()) == list(range(28))
        assert [vocabulary[word] for word in LEFT_VOCABULARY] == list(range(20))
        assert union.load().config.vocab_size == 28

    def test_embeddings_are_in_the_order_of_the_tokenizer(self, pair: Pair, union: Merged) -> None:
        for name in (EMBEDDING, HEAD):
            merged, (left, right) = (
                union.tensors[name],
                (tensors_of(model)[name] for model in pair.models),
            )
            first, second = union.coefficients.coefficients[name]
            new = AutoTokenizer.from_pretrained(union.path).get_vocab()
            for word in SHARED:
                row = first * left[LEFT_VOCABULARY.index(word)]
                row = row + second * right[RIGHT_VOCABULARY.index(word)]
                torch.testing.assert_close(merged[new[word]], row)
            for word in LEFT:
                row = left[LEFT_VOCABULARY.index(word)]
                torch.testing.assert_close(merged[new[word]], (first + second) * row)
            for word in RIGHT:
                row = right[RIGHT_VOCABULARY.index(word)]
                torch.testing.assert_close(merged[new[word]], (first + second) * row)

    @pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "gemma2", "phi"])
    def test_one_hot_coefficients_are_a_model_on_its_own_tokens(
        self, tmp_path: Path, architecture: str
    ) -> None:
        """Positions, scales, soft caps and the biases of a head too."""
        pair = save_pair(tmp_path, architecture)
        fitted = merge(pair.dam(), tmp_path / "fitted")
        fitted.load()
        for source, (model, text) in enumerate(zip(pair.models, pair.texts, strict=True)):
            coefficients = str(one_hot(fitted, source, tmp_path / f"coefficients {source}"))
            merged = merge(pair.dam(coefficients=coefficients), tmp_path / f"out {source}")
            own, new = (ids_of(path, lines_of(text)) for path in (model, merged.path))
            columns = own_columns(model, merged.path)
            assert torch.equal(columns[own], new)
            expected = logits(model, own)[..., : len(columns)]
            torch.testing.assert_close(logits(merged.path, new)[..., columns], expected)

    def test_every_fit_is_no_worse_than_the_average(self, union: Merged) -> None:
        fitted = [e for e in union.entries.values() if e["outcome"] == "fitted"]
        assert {EMBEDDING, HEAD, "model.layers.1.mlp.down_proj.weight"} <= {
            entry["name"] for entry in fitted
        }
        assert all(entry["held_out_fitted"] < entry["held_out_start"] for entry in fitted)

    @pytest.mark.parametrize("source", [0, 1])
    def test_a_teacher_is_a_model_on_its_own_ids(
        self, pair: Pair, union: Merged, tmp_path: Path, source: int
    ) -> None:
        """Merged to be one model, what is left to tell it from that is mass on other tokens."""
        start = str(one_hot(union, source, tmp_path / "coefficients"))
        configuration = pair.dam(objective="logits", start=start, steps=1, holdout=0)
        merged = merge(configuration, tmp_path / "out")
        found = merged.report["search"][0]["held_out_kl"][source]
        only = merge(pair.dam(coefficients=start), tmp_path / "only")
        tokens = calibration_ids(only, pair.texts[source])
        known = own_columns(pair.models[source], only.path)
        of_all = logits(only.path, tokens).double()
        missing = of_all.logsumexp(-1) - of_all[..., known].logsumexp(-1)
        assert found == pytest.approx(float(missing.mean()), rel=1e-5)
        assert found > 1e-3


def calibration_ids(merged: Merged, text: Path) -> Tensor:
    """The sequences that a merge of `SMALL` makes of a text, as ids of the merged model."""
    return load_calibration(
        str(text),
        model="merged",
        tokenizer=AutoTokenizer.from_pretrained(merged.path),
        samples=4,
        sequence_length=LENGTH,
        vocab_size=28,
        seed=0,
    ).tokens


class TestSources:
    @pytest.mark.parametrize("source", ["base", "left", "right"])
    def test_the_vocabulary_is_one_models(self, pair: Pair, tmp_path: Path, source: str) -> None:
        """With text in words that both know, one model's ids are for both."""
        chosen = pair.models[source == "right"]
        configuration = dam(
            pair.models,
            [pair.shared, pair.shared],
            settings={"tokenizer": {"source": source if source == "base" else str(chosen)}},
        )
        merged = merge(configuration, tmp_path / "out")
        vocabulary = AutoTokenizer.from_pretrained(chosen).get_vocab()
        tokenizer = AutoTokenizer.from_pretrained(merged.path)
        assert tokenizer.get_vocab() == vocabulary
        loaded = merged.load()
        assert loaded.config.vocab_size == len(vocabulary) == 20
        for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
            expected = getattr(tokenizer, special)
            assert getattr(loaded.config, special) == expected
            assert getattr(loaded.generation_config, special) == expected
        for index, model in enumerate(pair.models):
            coefficients = str(one_hot(merged, index, tmp_path / f"coefficients {index}"))
            configuration["parameters"]["coefficients"] = coefficients
            only = merge(configuration, tmp_path / f"only {index}")
            lines = lines_of(pair.shared)
            own, new = ids_of(model, lines), ids_of(only.path, lines)
            words = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(list(SHARED))
            there = [vocabulary[word] for word in SHARED]
            torch.testing.assert_close(
                logits(only.path, new)[..., there], logits(model, own)[..., words]
            )

    @pytest.mark.parametrize("source", [0, 1])
    def test_text_in_words_that_it_lacks_is_refused(
        self, pair: Pair, tmp_path: Path, source: int
    ) -> None:
        configuration = pair.dam({"source": str(pair.models[source])})
        with pytest.raises(CalibrationError) as error:
            merge(configuration, tmp_path / "out")
        message = error.value.message
        count = 8 if source == 0 else 5
        assert f"calibration of {pair.models[1 - source]}: its text has {count} tokens" in message
        assert f"as it gets the tokenizer of {pair.models[source]}; write `token" in message

    def test_the_older_way_to_write_it(self, pair: Pair, union: Merged, tmp_path: Path) -> None:
        configuration = dam(pair.models, pair.texts, settings={"tokenizer_source": "union"})
        assert merge(configuration, tmp_path / "out").model_bytes == union.model_bytes

    def test_without_the_section_it_is_refused_with_the_remedy(
        self, pair: Pair, tmp_path: Path
    ) -> None:
        with pytest.raises(CalibrationError, match=r"disagree[^§]*`tokenizer: {source: union}`"):
            merge(dam(pair.models, pair.texts), tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestSlices:
    def sliced(self, pair: Pair, second: slice) -> dict[str, Any]:
        """The merge of layer 0 of both models, and of layer 1 of some of them."""
        configuration = pair.dam()
        models = configuration.pop("models")
        configuration["slices"] = [
            {"sources": [{**entry, "layer_range": [0, 1]} for entry in models]},
            {"sources": [{**entry, "layer_range": [1, 2]} for entry in models[second]]},
        ]
        return configuration

    def test_of_all_layers_are_the_whole_merge(
        self, pair: Pair, union: Merged, tmp_path: Path
    ) -> None:
        merged = merge(self.sliced(pair, slice(None)), tmp_path / "out")
        assert merged.model_bytes == union.model_bytes

    def test_may_leave_a_model_out(self, pair: Pair, tmp_path: Path) -> None:
        merged = merge(self.sliced(pair, slice(1, None)), tmp_path / "out")
        assert merged.load().config.vocab_size == 28
        name = "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(merged.tensors[name], tensors_of(pair.models[1])[name])


class TestPadding:
    def test_rows_are_padded_to_a_multiple(self, pair: Pair, union: Merged, tmp_path: Path) -> None:
        merged = merge(pair.dam({"source": "union", "pad_to_multiple_of": 16}), tmp_path / "out")
        assert merged.load().config.vocab_size == 32
        for name in (EMBEDDING, HEAD):
            assert merged.tensors[name].shape == (32, 16)
            rows = merged.tensors[name][:28]
            torch.testing.assert_close(
                merged.tensors[name][28:], rows.mean(0).expand(4, -1), atol=1e-5, rtol=1e-4
            )
        # Padding is no token of any teacher's: nothing before the head knows of it.
        for name in union.tensors.keys() - {HEAD}:
            torch.testing.assert_close(merged.tensors[name][:28], union.tensors[name][:28])

    def test_a_vocabulary_that_fits_is_not_padded(self, pair: Pair, tmp_path: Path) -> None:
        merged = merge(pair.dam({"source": "union", "pad_to_multiple_of": 14}), tmp_path / "out")
        assert merged.tensors[EMBEDDING].shape == (28, 16)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
@pytest.mark.parametrize(
    "fit",
    [
        {"objective": "layer", "metric": "identity"},
        {"objective": "layer", "metric": "sensitivity"},
        {"objective": "layer+logits", "metric": "sensitivity", "steps": 4, "mse": 0.1},
        {"objective": "logits", "steps": 16},
    ],
    ids=["identity", "sensitivity", "layer+logits", "logits"],
)
def test_every_objective_comes_nearer_to_the_models_and_is_replayed(
    tmp_path: Path, fit: dict[str, Any], architecture: str
) -> None:
    pair = save_pair(tmp_path, architecture)
    merged = merge(pair.dam(samples=8, **fit), tmp_path / "out")
    loaded = merged.load()
    assert loaded.config.vocab_size == 28
    assert (HEAD in merged.tensors) is (architecture == "llama")
    search = merged.report["search"]
    assert bool(search) is (fit.get("metric") != "identity")
    assert all(math.isfinite(trial["mean_held_out_kl"]) for trial in search)
    assert (
        not search
        or min(r["mean_held_out_kl"] for r in search[1:]) < (search[0]["mean_held_out_kl"])
    )
    start = merge(pair.dam(coefficients=str(average(merged, tmp_path))), tmp_path / "average")
    assert distance(pair, merged) < distance(pair, start)
    replayed = merge(pair.dam(coefficients=str(merged.path)), tmp_path / "replayed")
    assert replayed.model_bytes == merged.model_bytes
    assert (replayed.path / "tokenizer.json").read_bytes() == (
        merged.path / "tokenizer.json"
    ).read_bytes()


def average(merged: Merged, folder: Path) -> Path:
    """Coefficients of the plain average."""
    fitted = merged.coefficients
    rows = {name: torch.full_like(own, 0.5) for name, own in fitted.coefficients.items()}
    path = folder / "averaged"
    path.mkdir()
    CoefficientFile(rows, fitted.sources, fitted.metadata).save(
        path / "dam_coefficients.safetensors"
    )
    return path


def distance(pair: Pair, merged: Merged) -> float:
    """KL of a merged model from the models themselves, on their text, in nats per token."""
    found = 0.0
    for model, text in zip(pair.models, pair.texts, strict=True):
        lines, columns = lines_of(text), own_columns(model, merged.path)
        own = logits(model, ids_of(model, lines))[..., : len(columns)].log_softmax(-1)
        new = logits(merged.path, ids_of(merged.path, lines)).log_softmax(-1)[..., columns]
        found += float((own.exp() * (own - new)).sum(-1).mean())
    return found


@pytest.mark.parametrize(("multiple", "force"), [(1, False), (16, False), (1, True)])
@pytest.mark.parametrize("fit", [{}, {"objective": "layer+logits", "metric": "sensitivity"}])
def test_a_plan_counts_the_rows_that_will_be_written(
    pair: Pair, tmp_path: Path, fit: dict[str, Any], multiple: int, force: bool
) -> None:
    tokens = {"aci": {"source": str(pair.models[0]), "force": force}}
    tokenizer = {"source": "union", "pad_to_multiple_of": multiple, "tokens": tokens}
    configuration = pair.dam(tokenizer, **{**fit, "steps": 2} if fit else {})
    file = tmp_path / "dam.yaml"
    file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
    LoaderCache.loaders.clear()
    with watched_reads() as reads:
        found = take_inventory(plan_merge(file, MergeOptions(quiet=True), tmp_path / "out"))
    assert not reads.order
    merged = merge(configuration, tmp_path / "out")
    expected = {name: tensor.numel() for name, tensor in merged.tensors.items()}
    assert {tensor.name: tensor.parameters for tensor in found.tensors} == expected
    assert {t.name: t.written for t in found.tensors} == {n: 4 * s for n, s in expected.items()}
    sizes = [sum(own.nbytes for own in tensors_of(model).values()) for model in pair.models]
    assert sum(tensor.stored for tensor in found.tensors) == sum(sizes)
    size = merged.load().config.vocab_size
    assert found.vocabulary == size
    aligned = {tensor.name: tensor.converted for tensor in found.tensors if tensor.converted}
    copies = 4 if force else 2
    assert aligned == {EMBEDDING: copies * 4 * 16 * size, HEAD: copies * 4 * 16 * size}


@pytest.mark.slow
def test_two_processes_have_one_vocabulary(pair: Pair, union: Merged, tmp_path: Path) -> None:
    merges = {"union": pair.dam()}
    (tmp_path / "merges.json").write_text(json.dumps(merges), encoding="utf-8")
    running = torchrun("-m", "tests.shared_merges", tmp_path)
    output, _ = running.communicate(timeout=300)
    assert running.returncode == 0, output
    two = Merged(tmp_path / "union")
    assert difference(two, union) < 1e-5
    torch.testing.assert_close(two.tensors, union.tensors, atol=1e-5, rtol=1e-4)
    assert (two.path / "tokenizer.json").read_bytes() == (
        union.path / "tokenizer.json"
    ).read_bytes()


class TestOverrides:
    """`tokens` in the section `tokenizer`: which embedding a token gets."""

    def test_a_new_token_gets_the_row_of_another(self, pair: Pair, tmp_path: Path) -> None:
        left = str(pair.models[0])
        source = {"kind": "model_token", "model": left, "token": "</s>"}
        tokens = {"<turn>": {"source": source}, "<nothing>": {"source": {"kind": "zero"}}}
        merged = merge(pair.dam({"source": "union", "tokens": tokens}), tmp_path / "out")
        vocabulary = AutoTokenizer.from_pretrained(merged.path).get_vocab()
        assert len(vocabulary) == merged.load().config.vocab_size == 30
        for name in (EMBEDDING, HEAD):
            row = tensors_of(pair.models[0])[name][LEFT_VOCABULARY.index("</s>")]
            sums = merged.coefficients.coefficients[name].sum(0)
            found = merged.tensors[name]
            torch.testing.assert_close(found[vocabulary["<turn>"]], sums * row)
            assert not found[vocabulary["<nothing>"]].any()

    def test_a_forced_row_is_the_merged_models_and_not_the_teachers(
        self, pair: Pair, tmp_path: Path
    ) -> None:
        tokens = {"aci": {"source": str(pair.models[0]), "force": True}}
        tokenizer = {"source": "union", "tokens": tokens}
        merged = merge(pair.dam(tokenizer), tmp_path / "out")
        new = AutoTokenizer.from_pretrained(merged.path).get_vocab()["aci"]
        for name in (EMBEDDING, HEAD):
            row = tensors_of(pair.models[0])[name][LEFT_VOCABULARY.index("aci")]
            sums = merged.coefficients.coefficients[name].sum(0)
            torch.testing.assert_close(merged.tensors[name][new], sums * row)
        # Merged to be the right model, it is that but for one row; the teacher is all of it.
        start = str(one_hot(merged, 1, tmp_path / "coefficients"))
        fit = {"objective": "logits", "start": start, "steps": 1, "holdout": 0}
        searched = merge(pair.dam(tokenizer, **fit), tmp_path / "searched")
        only = merge(pair.dam(tokenizer, coefficients=start), tmp_path / "only")
        model = pair.models[1]
        columns = own_columns(model, only.path)
        ids = calibration_ids(only, pair.texts[1])
        own = (ids[..., None] == columns).int().argmax(-1)
        assert new in ids
        wanted = logits(model, own)[..., : len(columns)].double().log_softmax(-1)
        got = logits(only.path, ids).double().log_softmax(-1)[..., columns]
        expected = float((wanted.exp() * (wanted - got)).sum(-1).mean())
        assert searched.report["search"][0]["held_out_kl"][1] == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize(
        ("token", "override", "message"),
        [
            ("<new>", {}, "required a `source`, since some models do not have the token"),
            ("abi", {"force": True}, "required a `source`, since `force` is set"),
            ("fob", {"source": "RIGHT"}, "RIGHT does not have the token"),
            ("<new>", {"source": "other/model"}, "other/model is no model of the merge"),
            (
                "<new>",
                {"source": {"kind": "model_token", "model": "LEFT", "token": "gub"}},
                "LEFT has no token 'gub'",
            ),
            (
                "<new>",
                {"source": {"kind": "model_token", "model": "LEFT", "token_id": 24}},
                "LEFT has no row 24, but 24 of them",
            ),
            (
                "<new>",
                {"source": {"kind": "model_token", "model": "other/model", "token": "gub"}},
                "other/model is no model of the merge",
            ),
        ],
    )
    def test_one_that_names_no_embedding_is_refused(
        self, pair: Pair, tmp_path: Path, token: str, override: dict[str, Any], message: str
    ) -> None:
        named = dict(zip(("LEFT", "RIGHT"), map(str, pair.models), strict=True))
        text = json.dumps({token: override})
        for name, path in named.items():
            text, message = text.replace(name, path), message.replace(name, path)
        configuration = pair.dam({"source": "union", "tokens": json.loads(text)})
        with watched_reads() as reads, pytest.raises(ConfigError) as error:
            merge(configuration, tmp_path / "out")
        assert f"tokenizer.tokens[{token!r}]: " in error.value.message
        assert message in error.value.message
        assert not reads.order


class TestTokenizersThatMergekitCannotBring:
    """mergekit would stop in the middle of the merge, or write rows of other tokens."""

    def refused(self, configuration: dict[str, Any], folder: Path) -> str:
        with watched_reads() as reads, pytest.raises(ConfigError) as error:
            merge(configuration, folder / "out")
        assert not reads.order
        return error.value.message

    def test_with_more_tokens_than_rows(self, pair: Pair, tmp_path: Path) -> None:
        right = tmp_path / "right"
        shutil.copytree(pair.models[1], right)
        tokenizer = AutoTokenizer.from_pretrained(right)
        tokenizer.add_tokens(["new" + "x" * index for index in range(7)])
        tokenizer.save_pretrained(right)
        settings = {"tokenizer": {"source": str(right)}}
        message = self.refused(
            dam([pair.models[0], right], pair.texts, settings=settings), tmp_path
        )
        assert f"{right} has 1 tokens ('newxxxxxx') without a row of its embedding" in message

    def test_with_gaps_between_the_ids(self, pair: Pair, tmp_path: Path) -> None:
        shutil.copytree(pair.models[0], tmp_path / "left")
        file = tmp_path / "left" / "tokenizer.json"
        file.write_text(file.read_text("utf-8").replace('"fot": 19', '"fot": 21'), "utf-8")
        models = (tmp_path / "left", pair.models[1])
        settings = {"tokenizer": {"source": "base"}}
        message = self.refused(dam(models, pair.texts, settings=settings), tmp_path)
        assert "without gaps, but the last of 20 tokens has id 21" in message


class TestSizes:
    """One vocabulary in embeddings of other numbers of rows."""

    @pytest.fixture
    def padded(self, tmp_path: Path) -> tuple[list[Path], list[Path]]:
        """Models of 66 and of 64 rows, and their texts."""
        models = []
        for index, rows in enumerate((66, 64)):
            model = make_model(tiny_llama_config(vocab_size=rows), seed=index)
            model.save_pretrained(tmp_path / str(rows))
            make_tokenizer().save_pretrained(tmp_path / str(rows))
            models.append(tmp_path / str(rows))
        return models, [save_text(tmp_path / f"{n}.jsonl", WORDS, seed=n) for n in (0, 1)]

    def test_what_only_padding_tells_apart_can_be_cut(
        self, padded: tuple[list[Path], list[Path]], tmp_path: Path
    ) -> None:
        models, texts = padded
        merged = merge(dam(models, texts), tmp_path / "out", unsafe_truncate_embeddings=True)
        assert merged.load().config.vocab_size == 64
        assert merged.tensors[EMBEDDING].shape == merged.tensors[HEAD].shape == (64, 16)
        replay = dam(models, coefficients=str(merged.path))
        replayed = merge(replay, tmp_path / "replayed", unsafe_truncate_embeddings=True)
        assert replayed.model_bytes == merged.model_bytes
        replayed.load()
        file = tmp_path / "dam.yaml"
        file.write_text(yaml.safe_dump(dam(models, texts)), encoding="utf-8")
        LoaderCache.loaders.clear()
        options = MergeOptions(quiet=True, unsafe_truncate_embeddings=True)
        found = take_inventory(plan_merge(file, options, tmp_path / "planned"))
        assert {tensor.name: tensor.parameters for tensor in found.tensors} == {
            name: tensor.numel() for name, tensor in merged.tensors.items()
        }

    def test_or_be_given_up_for_the_tokens_that_there_are(
        self, padded: tuple[list[Path], list[Path]], tmp_path: Path
    ) -> None:
        models, texts = padded
        merged = merge(
            dam(models, texts, settings={"tokenizer": {"source": "base"}}), tmp_path / "out"
        )
        assert merged.load().config.vocab_size == len(make_tokenizer())


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
            made = (
                load_calibration(
                    str(text),
                    model="own",
                    tokenizer=own,
                    samples=4,
                    sequence_length=LENGTH,
                    vocab_size=64,
                    seed=0,
                )
                .tokens.flatten()
                .tolist()
            )
            words = own.convert_ids_to_tokens(made)
            found = list(prepared.calibration.values())[index].tokens.flatten().tolist()
            assert tokenizer.convert_ids_to_tokens(found) == words
            assert "<turn>" in words
            assert ("<end>" in words) is (index == 1)


def test_losses_of_a_model_and_of_its_union_compare(
    pair: Pair, union: Merged, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Same tokens by other ids are no other tokens; a model that lacks words is warned of."""
    coefficients = str(one_hot(union, 1, tmp_path / "coefficients"))
    only = merge(pair.dam(coefficients=coefficients), tmp_path / "only")
    names = [str(pair.models[1]), str(only.path)]
    settings = EvaluationSettings(sequence_length=LENGTH, sequences=4)
    found = evaluate(names, [pair.texts[1]], settings).losses
    assert "differs" not in caplog.text
    own, merged = (found[name]["right"] for name in names)
    assert own < merged < own + 1  # tokens of the left model take some of the mass
    evaluate([names[0], str(pair.models[0])], [pair.texts[1]], settings)
    assert f"{pair.models[0]}: the tokenizer differs" in caplog.text


SENTENCES = (
    "the cat sat on the mat and the bat saw that the hat was fat",
    "der hund und die katze und der hase sassen in einem haus",
)


def save_languages(tmp_path: Path) -> tuple[list[Path], list[Path]]:
    """Models with byte-pair tokenizers of two languages, and their texts."""
    models, texts = [], []
    for index, sentence in enumerate(SENTENCES):
        tokenizer = train_tokenizer([sentence] * 20, vocab_size=300)
        model = make_model(tiny_llama_config(vocab_size=len(tokenizer)), seed=index)
        folder = tmp_path / str(index)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        models.append(folder)
        texts.append(save_text(tmp_path / f"{index}.jsonl", sentence.split(), seed=index))
    return models, texts


def test_words_that_the_base_lacks_are_written_in_its_pieces(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models, texts = save_languages(tmp_path)
    configuration = dam(models, texts, settings={"tokenizer": {"source": "base"}})
    merged = merge(configuration, tmp_path / "out")
    assert merged.load().config.vocab_size == len(AutoTokenizer.from_pretrained(models[0]))
    config = MergeConfiguration.model_validate(configuration)
    calibration = prepare(config, MergeOptions(quiet=True)).calibration
    read = AutoTokenizer.from_pretrained(merged.path)
    for ids, sentence in zip(calibration.values(), SENTENCES, strict=True):
        for row in ids.tokens:
            # Words at the edges of a sequence may be cut off; documents begin with a token.
            words = str(read.decode(row)).replace(str(read.bos_token), " ").split()[1:-1]
            assert words
            assert set(words) <= set(sentence.split())
    cut = [merged.report["calibration"][str(model)]["cut"] for model in models]
    assert not any("were cut into others" in said for said in cut[0])
    assert any("tokens that the merged model will not have were cut" in said for said in cut[1])
    assert "in other tokens" not in caplog.text


def test_a_text_that_the_merged_model_will_read_otherwise_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """mergekit adds byte-pair tokens to a union by names that no text has."""
    models, texts = save_languages(tmp_path)
    merged = merge(dam(models, texts, settings={"tokenizer": {"source": "union"}}), tmp_path / "o")
    assert f"calibration of {models[1]}: the merged model's tokenizer reads " in caplog.text
    assert f"calibration of {models[0]}: the merged model's tokenizer reads" not in caplog.text
    cut = merged.report["calibration"][str(models[1])]["cut"]
    share = next(said for said in cut if "of this text in other tokens" in said)
    assert 30 < int(re.findall("reads ([0-9]+)%", share)[0]) <= 100


@pytest.mark.parametrize("source", ["base", "union"])
@pytest.mark.parametrize(
    "fit",
    [{}, {"objective": "layer+logits", "metric": "sensitivity", "steps": 2}],
    ids=["layer", "layer+logits"],
)
def test_a_model_with_other_ids_for_its_tokens_is_merged_to_the_same_bytes(
    llama_models: Models,
    calibration: tuple[Path, Path],
    tmp_path: Path,
    fit: dict[str, Any],
    source: str,
) -> None:
    first, second = llama_models.models
    settings = {"tokenizer": {"source": source}}
    same = merge(dam([first, second], calibration, settings=settings, **fit), tmp_path / "same")
    order = torch.randperm(len(VOCABULARY), generator=torch.Generator().manual_seed(0)).tolist()
    tokenizer = word_tokenizer([VOCABULARY[own] for own in order])
    model = AutoModelForCausalLM.from_pretrained(second)
    with torch.no_grad():
        for name in (EMBEDDING, HEAD):
            rows = model.get_parameter(name)
            rows[: len(order)] = rows[order]
    for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, special, getattr(tokenizer, special))
    model.save_pretrained(tmp_path / "shuffled")
    tokenizer.save_pretrained(tmp_path / "shuffled")
    shuffled = [first, tmp_path / "shuffled"]
    merged = merge(dam(shuffled, calibration, settings=settings, **fit), tmp_path / "out")
    assert merged.model_bytes == same.model_bytes
    assert merged.coefficients.coefficients.keys() == same.coefficients.coefficients.keys()
