"""Models that dam refuses."""

from functools import partial

import transformers as tf

from tests.architectures.case import NO_DECODER, Case
from tests.architectures.sizes import tiny
from tests.kit.models import ARCHITECTURES, VOCAB_SIZE


def _class(title: str) -> str:
    """The beginning of the names of transformers' classes of an architecture."""
    return title.replace("RoBERT", "Robert").replace("BERT", "Bert").replace("-", "")


STATEFUL_BLOCKS: dict[str, Case] = {
    "gemma3n": Case(
        "Gemma 3n",
        tiny(
            tf.Gemma3nTextConfig,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=4,
            intermediate_size=[24] * 4,
            num_hidden_layers=4,
            num_kv_shared_layers=2,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 4,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        refused="one hidden state per token",
    ),
    "gemma4": Case(
        "Gemma 4",
        tiny(
            tf.Gemma4TextConfig,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=4,
        ),
        refused="depends on the text",
    ),
    "gemma4-unified": Case(
        "Gemma 4 unified", tiny(tf.Gemma4UnifiedTextConfig), refused="can leave something"
    ),
    "roformer": Case(
        "RoFormer", tiny(tf.RoFormerConfig, is_decoder=True), refused="weights outside"
    ),
    "rwkv": Case("RWKV", tiny(tf.RwkvConfig), refused="cannot run one by one"),
    "xlstm": Case("xLSTM", tiny(tf.xLSTMConfig), refused="cannot run one by one"),
}
"""Blocks hand on more than hidden states."""

NO_CAUSAL_DECODER: dict[str, Case] = {
    "t5": Case(
        "T5",
        partial(tf.T5Config, vocab_size=VOCAB_SIZE, d_model=16, d_ff=24, num_layers=1, num_heads=2),
        kind=tf.T5ForConditionalGeneration,
        refused=NO_DECODER,
    ),
    "whisper": Case(
        "Whisper",
        tiny(
            tf.WhisperConfig,
            encoder_layers=1,
            encoder_attention_heads=2,
            decoder_layers=1,
            decoder_attention_heads=2,
        ),
        kind=tf.WhisperForConditionalGeneration,
        refused=NO_DECODER,
    ),
    **{
        f"{name.lower()}-{task.lower()}": Case(
            name,
            tiny(getattr(tf, f"{_class(name)}Config")),
            kind=getattr(tf, f"{_class(name)}{task}"),
            refused=NO_DECODER,
        )
        for name, tasks in {
            "BERT": ("Model", "ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice"),
            "DistilBERT": ("Model", "ForMaskedLM", "ForSequenceClassification"),
            "RoBERTa": ("Model", "ForMaskedLM", "ForSequenceClassification"),
        }.items()
        for task in (*tasks, "ForTokenClassification")
    },
    **{
        f"{name.lower()}-classifier": Case(
            f"{name} classifiers",
            ARCHITECTURES[_class(name).lower()],
            kind=getattr(tf, f"{_class(name)}ForSequenceClassification"),
            refused=NO_DECODER,
        )
        for name in ("Llama", "GPT-2")
    },
}
