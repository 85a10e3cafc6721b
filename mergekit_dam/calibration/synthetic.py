"""Text that a model writes itself: documents sampled from it, as token ids.

1. A document begins as every calibration text does, with the ids of `document_start`. With a chat
   template it can begin with an empty user turn: the model writes what the user says, then its
   answer, as in Magpie (arXiv 2406.08464).
2. Documents are sampled in batches by transformers' `generate`, until they have as many tokens as
   are needed. Nothing but the seed decides what is drawn, and no global generator is touched.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mergekit_dam.calibration.packing import document_start
from mergekit_dam.errors import CalibrationError

BATCH = 16
"""Most documents that are sampled together. It is fixed, as another one gives other text."""
MOST_DOCUMENTS = 64
"""Most documents per sequence: a model that needs more ends them at once."""
TEMPERATURE = 1.0
_USER, _ANSWER = "[[what the user says]]", "[[what the model says]]"

Ids = list[int]
Render = Callable[[Sequence[Mapping[str, str]]], str]
"""Messages -> the chat as text, with every special token."""


@dataclass(frozen=True)
class Turns:
    """The ids of a chat template around what is said.

    Attributes:
        before: what comes before the user's words.
        between: what ends the user's turn and opens the answer.
        after: what ends the answer.
    """

    before: Ids
    between: Ids
    after: Ids


def chat_turns(tokenizer: PreTrainedTokenizerBase, render: Render) -> Turns:
    """The parts of a chat template around one question and its answer.

    Raises:
        CalibrationError: The template refuses such a chat, or changes what is said.
    """
    question = {"role": "user", "content": _USER}
    chat = render([question, {"role": "assistant", "content": _ANSWER}])
    before, _, rest = chat.partition(_USER)
    between, _, after = rest.partition(_ANSWER)
    if before + _USER + between + _ANSWER + after != chat:
        raise CalibrationError(
            "the chat template changes what is said, so that a model cannot write into it: "
            "write `self:start=text`"
        )
    parts = (tokenizer(part, add_special_tokens=False) for part in (before, between, after))
    return Turns(*(list(part["input_ids"]) for part in parts))


class Author:
    """A model that writes.

    Args:
        model: The model on its device; its generation settings are replaced.
        tokenizer: Its tokenizer.
        length: Most tokens of a document, those of its start included.
        seed: Seed of all that is drawn.
        progress: Bar that counts the tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int,
        seed: int,
        progress: "tqdm[NoReturn]",
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._length = length
        self._generator = torch.Generator(model.device).manual_seed(seed)
        self._progress = progress
        self._begun = 0
        settings = model.generation_config
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special |= set(tokenizer.all_special_ids)
        self._ends = _numbers(
            None if settings is None else settings.eos_token_id,
            model.config.get_text_config().eos_token_id,
            tokenizer.eos_token_id,
        )
        rows = range(model.config.get_text_config().vocab_size)
        self._ordinary = (set(tokenizer.get_vocab().values()) & set(rows)) - self._special
        self._rows = set(rows)

    def write(self, tokens: int, starts: Sequence[Turns | None]) -> list[Ids]:
        """Documents with `tokens` tokens or a few more, an equal share from every start.

        Args:
            tokens: Tokens that are needed.
            starts: The turns of a chat, or None for plain text.

        Raises:
            CalibrationError: The model ends its documents at once, or the template is too long.
        """
        documents: list[Ids] = []
        for number, turns in enumerate(starts):
            needed = tokens * (number + 1) // len(starts)
            while (written := sum(map(len, documents))) < needed:
                count = min(BATCH, -(-(needed - written) // self._length))
                made = self._texts(count) if turns is None else self._chats(count, turns)
                documents += made
                self._show(min(sum(map(len, documents)), tokens))
                if self._begun > MOST_DOCUMENTS * -(-tokens // self._length):
                    raise CalibrationError(
                        f"the model writes next to nothing: {written:,} of {tokens:,} tokens in "
                        f"{self._begun} documents, which it ended itself; name a source with text"
                    )
        return documents

    def _show(self, written: int) -> None:
        """Set the bar, which has counted documents that had ended as well."""
        self._progress.n = written
        self._progress.refresh()

    def _texts(self, count: int) -> list[Ids]:
        self._begun += count
        prompts = [document_start(self._tokenizer)] * count
        if not prompts[0]:  # generation cannot begin with nothing
            first = sorted(self._ordinary)
            drawn = torch.rand(count, generator=self._generator, device=self._generator.device)
            prompts = [[first[int(share * len(first))]] for share in drawn.tolist()]
        written = self._continued(prompts, self._length - len(prompts[0]), ())
        return [prompt + new for prompt, new in zip(prompts, written, strict=True) if new]

    def _chats(self, count: int, turns: Turns) -> list[Ids]:
        self._begun += count
        room = self._length - sum(map(len, (turns.before, turns.between, turns.after)))
        if room < 2:
            raise CalibrationError(
                f"sequences of {self._length} tokens have no room for a chat, whose template takes "
                f"{self._length - room}: set a larger `sequence_length`, or write `self:start=text`"
            )
        ends = (*turns.between[:1], *turns.after[:1])
        asked = self._continued([turns.before] * count, room // 2, ends)
        prompts = [[*turns.before, *question, *turns.between] for question in asked if question]
        if not prompts:
            return []
        most = self._length - len(turns.after) - max(map(len, prompts))
        answers = self._continued(prompts, most, ends)
        # An answer that fills its room has no end: the document was cut off.
        return [
            prompt + answer + (turns.after if len(answer) < most else [])
            for prompt, answer in zip(prompts, answers, strict=True)
            if answer
        ]

    def _continued(self, prompts: Sequence[Ids], most: int, ends: Sequence[int]) -> list[Ids]:
        """The ids that the model writes after each prompt, up to an end or `most` ids.

        Args:
            ends: Tokens that end a text beside those of the model; special ones alone count.
        """
        stops = sorted((self._ends | (set(ends) & self._special)) & self._rows)
        pad = stops[0] if stops else 0
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(own)) + list(own) for own in prompts])
        mask = torch.tensor([[0] * (longest - len(own)) + [1] * len(own) for own in prompts])
        # The model's own settings may leave out rare tokens, which its text would then lack.
        self._model.generation_config = GenerationConfig(
            do_sample=False,  # the likeliest token under `_Noise` is a sample
            max_new_tokens=most,
            eos_token_id=stops or None,
            pad_token_id=pad,
            # Neither rows of the head that no token has, nor special tokens in the midst.
            suppress_tokens=sorted(self._rows - self._ordinary - set(stops)) or None,
        )
        model: Any = self._model  # `generate` is untyped
        made: Tensor = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            logits_processor=LogitsProcessorList([_Noise(self._generator, self._progress)]),
        )
        return [_until(row, stops) for row in made[:, longest:].tolist()]


class _Noise(LogitsProcessor):
    """Adds Gumbel noise to logits: the largest is then a sample of their softmax.

    `generate` itself would sample from torch's global generator.
    """

    def __init__(self, generator: torch.Generator, progress: "tqdm[NoReturn]") -> None:
        self._generator = generator
        self._progress = progress

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        bar = self._progress
        bar.update(min(len(scores), (bar.total or 0) - bar.n))
        waits = torch.empty_like(scores).exponential_(generator=self._generator)
        return scores / TEMPERATURE - waits.clamp_min(torch.finfo(waits.dtype).tiny).log()


def _numbers(*found: Any) -> set[int]:
    """The ids among values that are an id, a list of ids, or None."""
    flat = [i for each in found for i in (each if isinstance(each, list) else [each])]
    return {token for token in flat if isinstance(token, int)}


def _until(ids: Ids, stops: Sequence[int]) -> Ids:
    """The ids before the first end."""
    end = next((index for index, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
