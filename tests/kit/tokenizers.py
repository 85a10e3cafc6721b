"""Tokenizers made in code."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_TEXT = """
zero one two three four five six seven eight nine ten plus minus times is equals the a of and in to
cat dog bird fish tree house river hill runs sits flies swims red green blue old new big small
def return print if else for while not true false
"""
WORDS = tuple(_TEXT.split())
VOCABULARY = ("<unk>", "<s>", "</s>", "<pad>", *WORDS)

SENTENCE = "the quick brown fox jumps over a lazy dog while numbers 0 1 2 3 add up to sums "
CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}{% endfor %}"
)


def byte_tokenizer(
    *, bos: bool = True, eos: bool = True, adds_bos: bool = False, chat: str | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE without unknown tokens; with `adds_bos` its post-processor adds bos."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([SENTENCE] * 4, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    special = {"bos_token": "<s>" if bos else None, "eos_token": "</s>" if eos else None}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{key: value for key, value in special.items() if value}
    )
    tokenizer.chat_template = chat
    return tokenizer


BYTES = tuple(f"<0x{number:02X}>" for number in range(256))


def bpe(tokens: Sequence[str], merges: Sequence[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    """Tokens in the order of their ids, made of their parts, or of bytes if those are tokens."""
    ids = {token: index for index, token in enumerate(tokens)}
    model = models.BPE(ids, list(merges), byte_fallback=BYTES[0] in ids)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


def word_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token per word; begins every text with <s>."""
    ids = {word: index for index, word in enumerate(vocabulary)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
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


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of `WORDS`; begins every text with <s>."""
    return word_tokenizer(VOCABULARY)
