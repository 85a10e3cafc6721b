"""A merge by the stock command in an environment that has this package and nothing of the checkout.

python .ci/smoke.py: makes two tiny models and texts in a temporary folder, and merges them.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_TEXT = "one two three plus minus is cat dog fish swims runs old"
WORDS = ("<unk>", "</s>", *_TEXT.split())


def save_model(folder: Path, seed: int) -> None:
    """A model of two layers with a tokenizer of words."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    ids = {word: number for number, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Merge, and check what was written."""
    scripts = Path(sysconfig.get_path("scripts"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = {"math": "one plus two is three ", "animals": "old fish swims dog runs "}
        for seed, (name, text) in enumerate(texts.items()):
            save_model(folder / name, seed)
            (folder / f"{name}.txt").write_text(text * 200, encoding="utf-8")
        entries = [f"{{model: {n}, parameters: {{calibration: {n}.txt}}}}" for n in texts]
        (folder / "dam.yaml").write_text(
            f"merge_method: dam\nmodels: [{', '.join(entries)}]\n"
            "parameters: {samples: 4, sequence_length: 16}\n",
            encoding="utf-8",
        )
        for command in (["mergekit-yaml", "dam.yaml", "out"], ["mergekit-dam", "verify", "out"]):
            subprocess.run([scripts / command[0], *command[1:]], cwd=folder, check=True)
        report = json.loads((folder / "out/dam_report.json").read_text("utf-8"))
        LlamaForCausalLM.from_pretrained(folder / "out")
    assert report["versions"]["mergekit-dam"] == version("mergekit-dam"), report["versions"]
    print(f"mergekit-dam {version('mergekit-dam')} merges on Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
