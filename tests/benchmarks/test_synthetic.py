"""The benchmark of costs: sizes, and models and texts made for them."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.benchmarks.measuring.models import Models
from examples.benchmarks.merge_cost import page_cache, synthetic
from examples.benchmarks.merge_cost.settings import Inputs, Settings, Sweep, every_case, parse_sweep
from mergekit_dam.errors import DamError
from tests.kit.benchmarks import TINY_SHAPE
from tests.kit.texts import calibration_tokens


class TestSizes:
    def test_a_sweep_is_read(self):
        assert parse_sweep("layers=12,24, 48,24") == Sweep("layers", (12, 24, 48))
        assert parse_sweep("sequence-length=64") == Sweep("sequence_length", (64,))

    @pytest.mark.parametrize("text", ["layers", "layers=", "layers=1,,2", "depth=1", "layers=-1"])
    def test_a_sweep_written_otherwise_is_refused(self, text):
        with pytest.raises(DamError, match="write NAME=VALUE,VALUE,"):
            parse_sweep(text)

    def test_a_sweep_changes_one_size_and_leaves_the_others(self, tmp_path):
        settings = Settings(out=tmp_path)
        sweeps = [Sweep("layers", (1, 3)), Sweep("samples", (5,))]
        assert every_case(TINY_SHAPE, settings, sweeps) == [
            ({"layers": 1}, replace(TINY_SHAPE, layers=1), settings),
            ({"layers": 3}, replace(TINY_SHAPE, layers=3), settings),
            ({"samples": 5}, TINY_SHAPE, replace(settings, samples=5)),
        ]
        assert every_case(TINY_SHAPE, settings, []) == [({}, TINY_SHAPE, settings)]

    def test_models_that_are_given_keep_their_shape(self, tmp_path):
        given = Inputs(Models({"a": "/a"}), {})
        settings = Settings(out=tmp_path)
        with pytest.raises(DamError, match="pass --synthetic, or sweep samples or sequence_length"):
            every_case(given, settings, [Sweep("layers", (1,))])
        ((case, source, _),) = every_case(given, settings, [Sweep("samples", (2,))])
        assert (case, source) == ({"samples": 2}, given)

    @pytest.mark.parametrize("sizes", [{"layers": 0}, {"hidden": 33}, {"vocab": 100}])
    def test_a_shape_that_cannot_be_is_refused(self, sizes):
        with pytest.raises(DamError, match=next(iter(sizes))):
            replace(TINY_SHAPE, **sizes)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return synthetic.make(TINY_SHAPE, tmp_path_factory.mktemp("made") / "models", tokens=300)


class TestSynthetic:
    def test_models_are_whole_and_near_to_each_other(self, made):
        states = []
        for path in made.models.specialists.values():
            loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
            model, info = loaded
            assert not any(info.values()), info
            assert model.config.num_hidden_layers == TINY_SHAPE.layers
            assert model.lm_head.weight.shape == (TINY_SHAPE.vocab, TINY_SHAPE.hidden)
            states.append(model.state_dict())
        for name, one in states[0].items():
            other = states[1][name]
            assert 0.02 < (one - other).norm() / one.norm() < 0.2, name

    def test_text_is_enough_and_every_models_own(self, made):
        tokens = []
        for name, path in made.models.specialists.items():
            tokenizer = AutoTokenizer.from_pretrained(path)
            found = calibration_tokens(
                made.calibrations[name],
                tokenizer,
                samples=10,
                sequence_length=30,
                vocab_size=TINY_SHAPE.vocab,
            )
            tokens.append(found)
        assert not torch.equal(*tokens)

    def test_a_file_holds_one_layer_however_many_there_are(self, tmp_path):
        for layers in (1, 4):
            folder = tmp_path / str(layers)
            given = synthetic.make(replace(TINY_SHAPE, layers=layers), folder, tokens=1)
            sizes = [
                {file.stat().st_size for file in Path(path).glob("*.safetensors")}
                for path in given.models.specialists.values()
            ]
            assert len(list((folder / "model_0").glob("*.safetensors"))) == layers + 2
            assert max(map(max, sizes)) < 4 * 1.1 * TINY_SHAPE.vocab * TINY_SHAPE.hidden

    def test_models_of_the_shape_are_kept_and_others_replaced(self, tmp_path):
        def written(shape, tokens):
            given = synthetic.make(shape, tmp_path, tokens=tokens)
            file = Path(given.models.any, "model.safetensors.index.json")
            return file.stat().st_mtime_ns, Path(given.calibrations["model_0"]).stat().st_size

        first = written(TINY_SHAPE, 10)
        again = written(TINY_SHAPE, 50_000)
        assert again[0] == first[0]
        assert again[1] > first[1]
        assert written(replace(TINY_SHAPE, models=1), 10)[0] != first[0]
        assert [path.name for path in sorted(tmp_path.glob("model_?"))] == ["model_0"]

    def test_half_made_models_are_made_anew(self, tmp_path):
        given = synthetic.make(TINY_SHAPE, tmp_path, tokens=1)
        whole = {file.name: file.read_bytes() for file in Path(given.models.any).iterdir()}
        (tmp_path / "shape.json").unlink()
        (Path(given.models.any) / "config.json").unlink()
        synthetic.make(TINY_SHAPE, tmp_path, tokens=1)
        assert whole == {file.name: file.read_bytes() for file in Path(given.models.any).iterdir()}


def test_files_dropped_from_the_page_cache_are_as_before(tmp_path):
    if sys.platform != "linux":
        pytest.skip("only Linux drops files")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"weights")
    page_cache.drop([str(tmp_path / "model"), "org/model"])
    assert (tmp_path / "model" / "weights").read_bytes() == b"weights"
