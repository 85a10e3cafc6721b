"""`loss_on=assistant`: the tokens that count are those that predict what an assistant wrote."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mergekit_dam.calibration.judgement import require_counted
from mergekit_dam.calibration.sets import CalibrationSet, tokens_sha256
from mergekit_dam.errors import CalibrationError
from tests.kit.tokenizers import byte_tokenizer

CHATS = [
    [("user", "the quick fox?"), ("assistant", "jumps over")],
    [("system", "add numbers"), ("user", "1 2?"), ("assistant", "3"),
     ("user", "0 1?"), ("assistant", "sums 1")],
    [("user", "a lazy dog?"), ("assistant", " while\n  numbers ")],
]  # fmt: skip
ANSWERS = [content for turns in CHATS for role, content in turns if role == "assistant"]

HEADER = "{{ '[' + m['role'] + ']' }}"
ANSWER = "{{ m['content'] + eos_token }}"
TURN = HEADER + ANSWER
INVITED = "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
LOOP = "{{ bos_token }}{% for m in messages %}"
PLAIN = LOOP + TURN + "{% endfor %}" + INVITED
MARKED = (
    LOOP + "{% if m['role'] == 'assistant' %}" + HEADER + "{% generation %}" + ANSWER
    + "{% endgeneration %}{% else %}" + TURN + "{% endif %}{% endfor %}"
)  # fmt: skip
THINKS = (  # as some models do: only the last answer keeps its thoughts
    LOOP + "{% if m['role'] == 'assistant' and loop.last %}" + HEADER + "<t></t>" + ANSWER
    + "{% else %}" + TURN + "{% endif %}{% endfor %}" + INVITED
)  # fmt: skip
ALTERNATES = (
    LOOP + "{% if not loop.first and m['role'] == loop.previtem['role'] %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + TURN + "{% endfor %}" + INVITED
)
IN_PARTS = (
    LOOP + "{% if m['content'] is not string %}" + HEADER + "{% for p in m['content'] %}"
    "{{ p['text'] }}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}" + INVITED
)


def with_template(template: str | None, **options: Any) -> PreTrainedTokenizerFast:
    return byte_tokenizer(chat=template, **options)


def messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def whole(load: Any, source: str, tokenizer: Any, **changes: Any) -> CalibrationSet:
    """All tokens of a source in one sequence."""
    own = {"tokenizer": tokenizer, "samples": 1, **changes}
    with pytest.raises(CalibrationError, match="are needed") as short:
        load(source, sequence_length=10_000, **own)
    (held,) = re.findall(r"holds (\d+) tokens", str(short.value))
    loaded: CalibrationSet = load(source, sequence_length=int(held), **own)
    return loaded


def predicted(loaded: CalibrationSet) -> torch.Tensor:
    """The ids that the tokens that count predict."""
    assert loaded.counted is not None
    assert loaded.counted.shape == loaded.tokens.shape
    assert loaded.counted.dtype == torch.bool
    found: torch.Tensor = loaded.tokens.flatten()[1:][loaded.counted.flatten()[:-1]]
    return found


def answers_in(loaded: CalibrationSet, tokenizer: Any) -> list[str]:
    text = tokenizer.decode(predicted(loaded), clean_up_tokenization_spaces=False)
    return sorted(part for part in str(text).split("</s>") if part)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", [PLAIN, MARKED, ALTERNATES, IN_PARTS])
def test_the_assistants_tokens_are_predicted_by_tokens_that_count(
    template: str, adds_bos: bool, write: Any, load: Any
) -> None:
    tokenizer = with_template(template, adds_bos=adds_bos)
    source = write("a.jsonl", [{"messages": messages(turns)} for turns in CHATS])
    loaded = whole(load, f"{source}:loss_on=assistant", tokenizer)
    assert answers_in(loaded, tokenizer) == sorted(ANSWERS)
    written = tokenizer([f"{text}</s>" for text in ANSWERS], add_special_tokens=False)
    count = sum(map(len, written.input_ids))
    provenance = loaded.provenance
    assert provenance.tokens_counted == count == len(predicted(loaded))
    assert f"{count} of {provenance.tokens_used} tokens count" in provenance.summary()


def test_marks_of_a_template_are_what_transformers_makes_of_them(write: Any, load: Any) -> None:
    tokenizer = with_template(MARKED)
    for number, turns in enumerate(CHATS):
        chat = messages(turns)
        encoded: Any = tokenizer.apply_chat_template(
            chat, return_dict=True, return_assistant_tokens_mask=True
        )
        source = write(f"{number}.jsonl", [{"messages": chat}])
        loaded = whole(load, f"{source}:loss_on=assistant", tokenizer)
        assert loaded.tokens[0].tolist() == encoded["input_ids"]
        assert loaded.counted is not None
        assert loaded.counted[0].tolist() == [*map(bool, encoded["assistant_masks"][1:]), False]


def test_earlier_answers_may_be_written_in_another_way_than_the_last(write: Any, load: Any) -> None:
    tokenizer = with_template(THINKS)
    source = write("a.jsonl", [{"messages": messages(CHATS[1])}])
    loaded = whole(load, f"{source}:loss_on=assistant", tokenizer)
    assert answers_in(loaded, tokenizer) == ["3", "<t></t>sums 1"]


MOVES = (  # the system's message stands before the last user's
    "{{ bos_token }}{% for m in messages if m['role'] != 'system' %}"
    "{% if loop.last or loop.nextitem is defined and loop.index == loop.length - 1 %}"
    "{{ messages[0]['content'] }}{% endif %}" + TURN + "{% endfor %}"
)


def test_a_template_that_does_not_tell_is_named_with_the_remedy(
    write: Any, load: Any, tmp_path: Path
) -> None:
    path = tmp_path / "moves.jinja"
    path.write_text(MOVES, encoding="utf-8")
    source = write("a.jsonl", [{"messages": messages(CHATS[1])}])
    with pytest.raises(
        CalibrationError, match=r"line 1: .*template .*moves\.jinja does not tell"
    ) as e:
        load(f"{source}:chat_template={path}:loss_on=assistant", tokenizer=with_template(None))
    assert "{% generation %}" in str(e.value)
    assert "`:loss_on=all`" in str(e.value)
    load(f"{source}:chat_template={path}:loss_on=all", tokenizer=with_template(None))


ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "Alpaca": ({"instruction": "add", "input": "1 2", "output": "3 sums"}, "3 sums"),
    "prompt and completion": ({"prompt": "the quick ", "completion": "brown fox"}, "brown fox"),
    "a completion that holds the prompt": (
        {"prompt": "the quick ", "completion": "the quick brown fox"},
        "brown fox",
    ),
    "a preference pair": ({"prompt": "a lazy ", "chosen": "dog", "rejected": "fox"}, "dog"),
}


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("kind", ROWS)
def test_answers_count_without_a_template(kind: str, adds_bos: bool, write: Any, load: Any) -> None:
    row, answer = ROWS[kind]
    tokenizer = with_template(None, adds_bos=adds_bos)
    source = write("a.jsonl", [row])
    loaded = whole(load, f"{source}:loss_on=assistant", tokenizer)
    # The token that begins before the answer and ends in it counts.
    assert [text.strip() for text in answers_in(loaded, tokenizer)] == [answer]
    assert loaded.tokens.equal(whole(load, source, tokenizer).tokens)


class TestTextWithoutAnswers:
    @pytest.mark.parametrize(
        ("row", "read_as"), [({"text": "the fox"}, "text"), ({"input_ids": [5, 6]}, "token ids")]
    )
    def test_is_refused_by_its_row(self, row: Any, read_as: str, write: Any, load: Any) -> None:
        source = write("a.jsonl", [row])
        with pytest.raises(CalibrationError, match=f"line 1 was read as {read_as}.* remove"):
            load(f"{source}:loss_on=assistant")

    def test_is_refused_before_it_is_read(self, write: Any, load: Any) -> None:
        source = write("a.txt", "the quick brown fox")
        with pytest.raises(CalibrationError, match=r"`loss_on` is for rows, but a \.txt"):
            load(f"{source}:loss_on=assistant")
        with pytest.raises(CalibrationError, match="`loss_on` is for text that is read"):
            load("self:loss_on=assistant")
        with pytest.raises(CalibrationError, match="must be one of assistant, all; got 'user'"):
            load(f"{write('a.jsonl', [])}:loss_on=user")
        assert load(f"{source}:loss_on=all", samples=1, sequence_length=4).counted is None


def test_a_tokenizer_that_does_not_know_the_characters_of_its_tokens_is_refused(
    write: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    source = write("a.jsonl", [{"messages": messages(CHATS[0])}])
    with pytest.raises(CalibrationError, match=r"is a slow one: .* tokenizer\.json"):
        load(f"{source}:loss_on=assistant", tokenizer=with_template(PLAIN))


class TestPacking:
    def test_nothing_is_predicted_across_documents(self, write: Any, load: Any) -> None:
        # An answer alone: its first token follows the last one of another document.
        tokenizer = with_template(None, bos=False, eos=False)
        rows = [{"prompt": "", "completion": text} for text in ("the fox", "a dog", "sums")]
        loaded = whole(load, f"{write('a.jsonl', rows)}:loss_on=assistant", tokenizer)
        assert loaded.counted is not None
        assert int((~loaded.counted).sum()) == len(rows)
        assert not loaded.counted[0, -1]

    def test_sequences_and_pieces_cut_the_mask_as_they_cut_the_text(
        self, write: Any, load: Any
    ) -> None:
        tokenizer = with_template(PLAIN)
        turns = [("user", "the quick brown fox " * 9), ("assistant", "jumps over 1 2 3 " * 30)]
        source = write("a.jsonl", [{"messages": messages(turns)}]) + ":loss_on=assistant"
        long = load(source, tokenizer=tokenizer, samples=11, sequence_length=16)
        assert any("were cut into pieces" in said for said in long.provenance.cut)
        text = tokenizer.decode(predicted(long), clean_up_tokenization_spaces=False)
        assert "fox" not in text
        assert "[assistant]" not in text
        user = tokenizer.decode(long.tokens.flatten()).count("fox")
        assert user  # which does not count
        assert long.provenance.tokens_counted == int(long.counted.sum()) > 0

    def test_tokens_that_are_cut_into_others_count_as_before(self, write: Any, load: Any) -> None:
        tokenizer = with_template(PLAIN)
        source = write("a.jsonl", [{"messages": messages(CHATS[0])}]) + ":loss_on=assistant"
        (fox,) = tokenizer(" over", add_special_tokens=False).input_ids
        parts = tokenizer.convert_tokens_to_ids(["Ġ", "o", "v", "e", "r"])
        before = whole(load, source, tokenizer)
        after = whole(load, source, tokenizer, spelled=lambda t: parts if t == fox else [t])
        assert answers_in(after, tokenizer) == answers_in(before, tokenizer)
        assert len(predicted(after)) == len(predicted(before)) + 4


def test_the_digest_is_that_of_the_ids_where_all_count_and_else_of_the_mask_too(
    write: Any, load: Any
) -> None:
    tokenizer = with_template(PLAIN)
    source = write("a.jsonl", [{"messages": messages(turns)} for turns in CHATS])
    plain, everything = (
        whole(load, source, tokenizer),
        whole(load, f"{source}:loss_on=all", tokenizer),
    )
    masked = whole(load, f"{source}:loss_on=assistant", tokenizer)
    assert plain.counted is everything.counted is None
    assert plain.provenance.sha256 == everything.provenance.sha256 == tokens_sha256(plain.tokens)
    assert masked.tokens.equal(plain.tokens)
    assert masked.provenance.sha256 != plain.provenance.sha256
    assert "tokens_counted" not in plain.provenance.told()
    assert masked.provenance.told()["tokens_counted"] == masked.provenance.tokens_counted


def test_sources_of_both_kinds_make_one_mask(write: Any, load: Any) -> None:
    tokenizer = with_template(PLAIN)
    chats = write("a.jsonl", [{"messages": messages(turns)} for turns in CHATS * 3])
    text = write("b.txt", "the quick brown fox jumps over a lazy dog " * 9)
    sources = (f"{chats}:loss_on=assistant:samples=2", f"{text}:samples=3")
    loaded = load(sources, tokenizer=tokenizer)
    assert loaded.counted is not None
    full = loaded.counted.all(1)
    assert full.sum() == 3
    assert loaded.provenance.tokens_counted == 3 * 8 + loaded.counted[~full].sum()


def test_text_of_which_nothing_counts_is_refused_by_its_split(write: Any, load: Any) -> None:
    tokenizer = with_template(PLAIN)
    source = write("a.jsonl", [{"messages": messages(CHATS[0] * 4)}])
    loaded = load(f"{source}:loss_on=assistant", tokenizer=tokenizer, samples=4)

    def counting(*sequences: bool) -> CalibrationSet:
        counted = torch.tensor(sequences)[:, None].expand(4, 8)
        return CalibrationSet(loaded.tokens, loaded.provenance, counted=counted)

    require_counted(counting(True, False, False, True), 2, "m")
    require_counted(counting(True, False, False, False), 0, "m")
    for mask, where in [
        ((False, False, True, True), "the sequences of the fit"),
        ((True, True, False, False), "the held-out sequences"),
        ((False,) * 4, "the text"),
    ]:
        with pytest.raises(CalibrationError, match=f"of m: .* no token of {where} is"):
            require_counted(counting(*mask), 2, "m")
