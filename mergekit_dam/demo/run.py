"""The whole demo, from the text to the table.

1. Make the text, and a tokenizer from it; write the held-out parts as calibration and test text.
2. Train the base on a mixture of all training text.
3. Train a specialist from the base on each domain.
4. Write the YAML files and merge with mergekit's own command.
5. Measure every model on the test text of every domain.

Nothing of an earlier run is reused: files of an interrupted run are overwritten.
"""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import click
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from mergekit_dam import __version__
from mergekit_dam.demo.merge import merge
from mergekit_dam.demo.recipes import METHODS, recipe, text_path
from mergekit_dam.demo.result import DemoResult
from mergekit_dam.demo.settings import DemoSettings
from mergekit_dam.demo.texts import DOMAINS, Corpus, make_corpus
from mergekit_dam.demo.training import draw, new_model, pack_documents, train, train_tokenizer
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.evaluation import evaluate
from mergekit_dam.evaluation.settings import EvaluationSettings
from mergekit_dam.threads import use_own_share

MARKER = "demo.json"  # a folder with this file is an earlier demo's and may be overwritten


def run_demo(
    directory: Path, *, settings: DemoSettings | None = None, force: bool = False
) -> DemoResult:
    """Run the demo in a folder; the module's docstring lists the steps.

    Progress goes to stderr. The same settings give the same result, on the same machine
    with the same number of threads.

    Args:
        directory: The folder; made if it does not exist.
        settings: Settings of the demo; the defaults if None.
        force: Write into the folder even if it has other files.

    Raises:
        DamError: If the folder has other files and `force` is not set, or if a merge fails.
    """
    settings = settings or DemoSettings()
    use_own_share(settings.model.hidden_size)
    _claim(directory, settings, force=force)

    _say("1/5 Text and tokenizer")
    corpus = make_corpus(
        train=settings.train_characters,
        english=settings.english_characters,
        held_out=settings.held_out_characters,
        seed=settings.seed,
    )
    _write_texts(corpus, directory)
    tokenizer = train_tokenizer(_tokenizer_text(corpus), vocab_size=settings.model.vocab_size)
    english, *domains = (
        pack_documents(documents, tokenizer, sequence_length=settings.sequence_length)
        for documents in (corpus.english, *(corpus.domains[name].train for name in DOMAINS))
    )

    _say("2/5 Base model")
    base = _train_base(english, domains, tokenizer, settings)
    _save(base, tokenizer, directory / "base")

    _say("3/5 Specialists")
    for name, specialist in zip(DOMAINS, train_specialists(base, domains, settings), strict=True):
        _save(specialist, tokenizer, directory / name)

    _say("4/5 Merges")
    for method in METHODS:
        config = directory / f"{method}.yaml"
        _write(config, recipe(method, directory, settings))
        merge(config, directory / "merged" / method)

    _say("5/5 Held-out losses")
    result = _measure(directory, settings)
    _write(directory / "losses.json", json.dumps(result.losses, indent=2) + "\n")
    return result


def _claim(directory: Path, settings: DemoSettings, *, force: bool) -> None:
    """Mark a folder as the demo's; refuse it if it has other files, unless `force` is set."""
    if set("+@") & set(str(directory)):
        raise DamError(
            f"{directory} has a + or @ in its path, which mergekit reads as an adapter or a "
            f"revision: name another folder"
        )
    ours = not directory.exists() or (directory / MARKER).is_file()
    if not ours and not force and any(directory.iterdir()):
        raise DamError(
            f"{directory} holds other files: name a folder that is new, empty or an earlier "
            f"demo's, or pass --force to write into this one"
        )
    directory.mkdir(parents=True, exist_ok=True)
    about = {"mergekit_dam": __version__, "torch": torch.__version__, "settings": asdict(settings)}
    _write(directory / MARKER, json.dumps(about, indent=2) + "\n")
    (directory / "losses.json").unlink(missing_ok=True)


def _write_texts(corpus: Corpus, directory: Path) -> None:
    (directory / "data").mkdir(exist_ok=True)
    for name, split in corpus.domains.items():
        for part, documents in (("calibration", split.calibration), ("test", split.test)):
            lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
            _write(text_path(directory, name, part), lines)


def _tokenizer_text(corpus: Corpus) -> Iterator[str]:
    """Yield half of all training text, which is enough for a small vocabulary."""
    yield from corpus.english[::2]
    for split in corpus.domains.values():
        yield from split.train[::2]


def _train_base(
    english: torch.Tensor,
    domains: list[torch.Tensor],
    tokenizer: PreTrainedTokenizerFast,
    settings: DemoSettings,
) -> LlamaForCausalLM:
    shares = [settings.domain_share] * len(domains)
    drawn = draw(
        [english, *domains],
        [1 - sum(shares), *shares],
        count=settings.pretraining.sequences,
        seed=settings.seed,
    )
    return train(new_model(settings, tokenizer), drawn, settings.pretraining, name="base")


def train_specialists(
    base: LlamaForCausalLM, domains: list[torch.Tensor], settings: DemoSettings
) -> list[LlamaForCausalLM]:
    """Train all side by side: models are so small that each computes with one thread.

    An interrupt ends all after their next step.
    """
    training, ended = settings.finetuning, threading.Event()

    def trained(name: str, sequences: torch.Tensor) -> LlamaForCausalLM:
        drawn = draw([sequences], [1.0], count=training.sequences, seed=settings.seed + 1)
        return train(base, drawn, training, name=name, ended=ended.is_set)

    with ThreadPoolExecutor(len(domains)) as side_by_side:
        try:
            return list(side_by_side.map(trained, DOMAINS, domains))
        finally:
            ended.set()


def _measure(directory: Path, settings: DemoSettings) -> DemoResult:
    folders = {name: directory / name for name in ("base", *DOMAINS)}
    folders |= {method: directory / "merged" / method for method in METHODS}
    evaluation = evaluate(
        [folder.as_posix() for folder in folders.values()],
        [text_path(directory, domain, "test") for domain in DOMAINS],
        EvaluationSettings(
            sequence_length=settings.sequence_length, sequences=settings.test_sequences
        ),
    )
    return DemoResult(
        {
            name: dict(zip(DOMAINS, evaluation.losses[folder.as_posix()].values(), strict=True))
            for name, folder in folders.items()
        }
    )


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _say(text: str) -> None:
    click.echo(text, err=True)
