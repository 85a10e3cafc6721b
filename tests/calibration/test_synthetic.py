"""Text that a model writes itself: what is drawn, how it begins and ends, and what is refused."""

from collections import Counter
from io import StringIO
from typing import Any

import pytest
import torch
from tqdm import tqdm
from transformers import PhiConfig, PreTrainedModel, PreTrainedTokenizerBase

from mergekit_dam.calibration.synthetic import Author, Turns, chat_turns
from mergekit_dam.errors import CalibrationError
from tests.kit.models import logits_of, make_model, tiny_llama_config
from tests.kit.tokenizers import CHAT, byte_tokenizer, make_tokenizer

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model(tiny_llama_config(vocab_size=64))


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    tokens: int = 200,
    length: int = 16,
    seed: int = 0,
    starts: tuple[Turns | None, ...] = (None,),
) -> list[list[int]]:
    own = tokenizer or make_tokenizer()
    with tqdm(total=tokens, disable=True) as progress, torch.inference_mode():
        author = Author(model, own, length=length, seed=seed, progress=progress)
        return author.write(tokens, starts)


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns:
    def render(messages: Any) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    return chat_turns(tokenizer, render)


def chat_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Its vocabulary is the tokenizer's, and each token is about as likely as another."""
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    config = tiny_llama_config(vocab_size=len(tokenizer), **special)
    config.max_position_embeddings = 256
    return make_model(config)


class TestText:
    def test_tokens_are_drawn_from_the_models_own_distribution(
        self, model: PreTrainedModel
    ) -> None:
        documents = write(model, tokens=4000, length=2)
        found = Counter(second for _, second in documents)
        ordinary = sorted(set(range(len(make_tokenizer()))) - {0, 1, 2, 3})
        logits = logits_of(model, torch.tensor([[BOS]]))[0, -1].double()
        expected = logits[ordinary].softmax(0)
        shares = torch.tensor([found[token] for token in ordinary]).double() / len(documents)
        assert set(found) <= set(ordinary)
        assert len(documents) >= 2000
        assert (shares - expected).abs().sum() < 0.15  # 0.11 is what as many true draws have
        assert (1 / len(ordinary) - expected).abs().sum() > 0.4

    def test_later_tokens_depend_on_those_before(self, model: PreTrainedModel) -> None:
        """Each token is about as likely as the model finds it, after what was written before."""
        documents = write(model, tokens=3000)
        ids = torch.tensor([own for own in documents if len(own) == 16])
        logits = logits_of(model, ids)[:, :-1].double()
        logits[..., [0, 1, 3, *range(len(make_tokenizer()), 64)]] = -torch.inf
        chances = logits.log_softmax(-1)
        said = chances.gather(-1, ids[:, 1:, None]).mean()
        entropy = -(chances.exp() * chances.clamp_min(-1e3)).sum(-1).mean()
        assert len(ids) > 50
        assert abs(float(-said - entropy)) < 0.1

    def test_the_seed_alone_decides(self, model: PreTrainedModel) -> None:
        before = torch.get_rng_state()
        first = write(model)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(5)
        assert write(model) == first
        assert write(model, seed=1) != first

    def test_the_models_own_settings_of_generation_are_not_followed(self) -> None:
        plain = write(make_model(tiny_llama_config()))
        other = make_model(tiny_llama_config())
        settings: Any = other.generation_config
        settings.update(top_k=1, repetition_penalty=9.0, max_length=5)
        assert write(other) == plain

    def test_documents_begin_as_texts_do_and_have_no_special_tokens(
        self, model: PreTrainedModel
    ) -> None:
        documents = write(model)
        assert all(own[0] == BOS and 2 <= len(own) <= 16 for own in documents)
        written = {token for own in documents for token in own[1:]}
        assert written <= set(range(4, len(make_tokenizer())))

    def test_there_are_as_many_tokens_as_needed_and_hardly_more(
        self, model: PreTrainedModel
    ) -> None:
        for tokens in (1, 100, 1000):
            assert tokens <= sum(map(len, write(model, tokens=tokens))) < tokens + 16

    def test_without_a_token_to_begin_with_a_word_is_drawn(self, model: PreTrainedModel) -> None:
        tokenizer = byte_tokenizer(bos=False, eos=False)
        model = make_model(tiny_llama_config(vocab_size=len(tokenizer), eos_token_id=None))
        documents = write(model, tokenizer)
        assert len({own[0] for own in documents}) > 5
        assert all(len(own) == 16 for own in documents[:-1])

    def test_every_end_that_the_model_knows_ends_a_document(self) -> None:
        model = make_model(tiny_llama_config())
        settings: Any = model.generation_config
        settings.eos_token_id = [EOS, 7, 8]
        written = {token for own in write(model, tokens=1000) for token in own}
        assert not written & {EOS, 7, 8}
        assert 9 in written

    def test_a_model_that_ends_at_once_is_refused(self) -> None:
        config = PhiConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, bos_token_id=BOS, eos_token_id=EOS,
        )  # fmt: skip
        model = make_model(config)
        with torch.no_grad():
            model.get_parameter("lm_head.bias")[EOS] = 100.0
        with pytest.raises(CalibrationError, match=r"writes next to nothing: 0 of 200 tokens"):
            write(model)


class TestChat:
    def test_a_chat_is_a_question_and_an_answer_in_the_template(self) -> None:
        tokenizer = byte_tokenizer(chat=CHAT)
        turns = turns_of(tokenizer)
        documents = write(chat_model(tokenizer), tokenizer, length=64, starts=(turns,))
        for own in documents:
            text = str(tokenizer.decode(own))
            assert text.startswith("<s>[user] ")
            head, _, answer = text.partition("</s>[assistant] ")
            assert len(head) > len("<s>[user] ")
            assert answer
            assert len(own) <= 64

    def test_an_answer_that_ends_is_ended_by_the_template(self) -> None:
        tokenizer = byte_tokenizer(chat=CHAT)
        turns = (turns_of(tokenizer),)
        documents = write(chat_model(tokenizer), tokenizer, tokens=8000, length=256, starts=turns)
        ended = [own for own in documents if own.count(1) == 2]
        cut = [own for own in documents if own.count(1) == 1]
        assert ended
        assert cut
        assert len(ended) + len(cut) == len(documents)
        assert all(own[-1] == 1 for own in ended)

    def test_every_start_gets_its_share(self) -> None:
        tokenizer = byte_tokenizer(chat=CHAT)
        starts = (None, turns_of(tokenizer))
        documents = write(chat_model(tokenizer), tokenizer, tokens=1000, length=64, starts=starts)
        chats = [own for own in documents if str(tokenizer.decode(own)).startswith("<s>[user] ")]
        assert 400 < sum(map(len, chats)) < 700

    def test_a_template_that_changes_what_is_said_is_refused(self) -> None:
        shouting = CHAT.replace("message['content']", "message['content'] | upper")
        with pytest.raises(CalibrationError, match=r"changes what is said.*self:start=text"):
            turns_of(byte_tokenizer(chat=shouting))

    def test_sequences_shorter_than_the_template_are_refused(self) -> None:
        tokenizer = byte_tokenizer(chat=CHAT)
        with pytest.raises(CalibrationError, match="no room for a chat"):
            write(chat_model(tokenizer), tokenizer, length=16, starts=(turns_of(tokenizer),))


def test_the_bar_counts_tokens_up_to_what_is_needed(model: PreTrainedModel) -> None:
    shown = []

    class Bar(tqdm):
        def refresh(self, *args: Any, **kwargs: Any) -> None:
            shown.append(self.n)

    with Bar(total=600, mininterval=0, file=StringIO()) as bar, torch.inference_mode():
        author = Author(model, make_tokenizer(), length=16, seed=0, progress=bar)
        author.write(600, (None,))
    assert shown[-1] == 600
    assert max(shown) == 600
    assert len(set(shown)) > 20  # it moves within a batch
