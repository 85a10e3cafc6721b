"""Train the demo's models: a base from scratch, and specialists from the base."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mergekit_dam.demo.muon import Muon
from mergekit_dam.demo.settings import DemoSettings, TrainingSettings
from mergekit_dam.repeatable import repeatable


def pack_documents(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerFast, *, sequence_length: int
) -> torch.Tensor:
    """Documents end to end, a bos before each: int64 ids `[sequences, sequence_length]`."""
    ids: list[int] = []
    for document in tokenizer(list(documents), add_special_tokens=False)["input_ids"]:
        ids += [tokenizer.bos_token_id, *document]
    sequences = len(ids) // sequence_length
    return torch.tensor(ids[: sequences * sequence_length]).view(sequences, sequence_length)


def new_model(settings: DemoSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama model with random weights that depend on the seed alone."""
    shape = settings.model
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=2 * settings.sequence_length,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(config)


def draw(
    parts: Sequence[torch.Tensor], shares: Sequence[float], *, count: int, seed: int
) -> torch.Tensor:
    """Draw `count` sequences from several texts by their shares, in random order.

    A text that is too short is used several times.

    Args:
        parts: Sequences of each text, int64 `[sequences, sequence_length]`.
        shares: Share of each text; they sum to one.
        count: Number of sequences to draw.
        seed: Seed of the choice and the order.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for part, share in zip(parts, shares, strict=True):
        needed = math.ceil(count * share)
        rounds = [torch.randperm(len(part), generator=generator)]
        while sum(map(len, rounds)) < needed:
            rounds.append(torch.randperm(len(part), generator=generator))
        drawn.append(part[torch.cat(rounds)[:needed]])
    together = torch.cat(drawn)
    return together[torch.randperm(len(together), generator=generator)][:count]


def train(
    model: LlamaForCausalLM,
    sequences: torch.Tensor,
    settings: TrainingSettings,
    *,
    name: str,
    ended: Callable[[], bool] = lambda: False,
) -> LlamaForCausalLM:
    """Train a copy of a model and return it.

    Args:
        model: Model from which training starts; not changed.
        sequences: int64 `[steps * batch_size, sequence_length]`, in the order of training.
        settings: Settings of the training.
        name: Name for the progress bar.
        ended: Asked after every step whether the training ends early.
    """
    model = copy.deepcopy(model)
    model.train()
    optimizers = _optimizers(model, settings)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(settings))
        for optimizer in optimizers
    ]
    with repeatable(), tqdm(torch.split(sequences, settings.batch_size), desc=name) as batches:
        for batch in batches:
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            model.zero_grad()
            batches.set_postfix(loss=f"{loss.item():.3f}")
            if ended():
                break
    model.eval()
    return model


def _optimizers(model: LlamaForCausalLM, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    inner = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    known = set(map(id, inner))
    others = [p for p in model.parameters() if id(p) not in known]

    def adamw(weights: list[torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    return [
        Muon(inner, lr=settings.matrix_rate)
        if settings.matrices_by_muon
        else adamw(inner, settings.matrix_rate),
        adamw(others, settings.other_rate),
    ]


def _schedule(settings: TrainingSettings) -> Callable[[int], float]:
    """Factor of the learning rate: a linear rise over a tenth of the steps, times a cosine."""

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / (0.1 * settings.steps))
        cosine = (1 + math.cos(math.pi * min(1.0, step / settings.steps))) / 2
        return rise * (settings.final_rate + (1 - settings.final_rate) * cosine)

    return factor


BOS, EOS = "<s>", "</s>"


def train_tokenizer(documents: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on documents; digits stay single tokens, which arithmetic needs.

    The result has `BOS` as token 0 and `EOS` as token 1 and adds neither by itself.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)
