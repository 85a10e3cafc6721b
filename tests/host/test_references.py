"""What the names of models in a configuration mean."""

import json
from pathlib import Path

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache

from mergekit_dam.errors import ArchitectureError, ConfigError
from mergekit_dam.host.references import Source, check_sources, source_of, with_sources
from tests.kit.adapters import save_adapter
from tests.kit.models import Models


def meant(text: str) -> tuple[str, str | None, str | None]:
    """Path, revision and adapter of the model that a text in a configuration means."""
    source = source_of(ModelReference.parse(text))
    return source.model.path, source.model.revision, source.lora.path if source.lora else None


@pytest.fixture
def adapter(llama_models: Models, tmp_path: Path) -> Path:
    return save_adapter(llama_models.base, tmp_path / "adapter")


class TestNames:
    def test_a_folder_with_a_plus_or_an_at_in_its_name_is_that_folder(self, tmp_path: Path) -> None:
        for name in ("qwen+math", "qwen@home"):
            (tmp_path / name).mkdir()
            assert meant(str(tmp_path / name)) == (str(tmp_path / name), None, None)

    def test_two_spellings_of_a_folder_are_one_model(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a").mkdir()
        monkeypatch.chdir(tmp_path)
        assert meant("a/") == meant("./a") == meant("a") == ("a", None, None)

    def test_a_revision_and_an_adapter_stay_what_they_are(
        self, llama_models: Models, adapter: Path
    ) -> None:
        assert meant("org/a@v2") == ("org/a", "v2", None)
        assert meant(f"{llama_models.base}+{adapter}/") == (
            *(str(llama_models.base), None),
            str(adapter),
        )

    def test_an_adapter_alone_means_its_base_with_it(
        self, llama_models: Models, adapter: Path
    ) -> None:
        assert meant(str(adapter)) == (str(llama_models.base), None, str(adapter))

    def test_an_adapter_alone_whose_base_is_gone_is_refused(self, adapter: Path) -> None:
        settings = adapter / "adapter_config.json"
        own = json.loads(settings.read_text("utf-8"))
        settings.write_text(json.dumps({**own, "base_model_name_or_path": "/gone"}), "utf-8")
        with pytest.raises(ConfigError, match=r"write BASE\+"):
            source_of(ModelReference.parse(str(adapter)))

    def test_every_reference_of_a_configuration_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        a = f"{tmp_path / 'a'}/"
        config = MergeConfiguration.model_validate(
            {
                "merge_method": "dam",
                "base_model": "org/base",
                "models": [{"model": a, "parameters": {"calibration": a}}],
                "tokenizer": {"source": a, "tokens": {"<x>": {"source": a}}},
            }
        )
        replaced = with_sources(config)
        assert replaced.models is not None
        source = replaced.models[0].model
        assert isinstance(source, Source)
        assert str(source) == str(tmp_path / "a")
        assert replaced.models[0].parameters == {"calibration": a}
        assert replaced.tokenizer is not None
        assert replaced.tokenizer.source == source
        assert replaced.tokenizer.tokens is not None
        assert replaced.tokenizer.tokens["<x>"].source == source
        assert str(replaced.base_model) == "org/base"
        assert with_sources(replaced) == replaced


COMMIT = "0" * 40


class TestHub:
    @pytest.fixture(autouse=True)
    def _offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unreachable(*_: object, **__: object) -> None:
            raise OfflineModeIsEnabled("no connection")

        monkeypatch.setattr("huggingface_hub.list_repo_files", unreachable)

    def test_a_model_in_the_cache_needs_no_connection(self, tmp_path: Path) -> None:
        folder = tmp_path / "models--org--a"
        (folder / "snapshots" / COMMIT).mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "v2").write_text(COMMIT)
        source = Source(model=ModelPath(path="org/a", revision="v2"))
        assert source.local_path(str(tmp_path)) == str(folder / "snapshots" / COMMIT)

    def test_a_model_of_which_only_the_tokenizer_is_cached_is_not_judged_yet(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "models--org--a" / "snapshots" / COMMIT
        folder.mkdir(parents=True)
        (folder / "tokenizer.model").touch()
        monkeypatch.setattr(LoaderCache(), "hf_cache_dir", str(tmp_path))
        check_sources([Source(model=ModelPath(path="org/a", revision=COMMIT))])
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}')
        with pytest.raises(ArchitectureError, match="b is missing"):
            check_sources([Source(model=ModelPath(path="org/a", revision=COMMIT))])

    def test_a_model_that_is_not_there_is_refused_with_the_remedy(self, tmp_path: Path) -> None:
        source = Source(model=ModelPath(path="org/a"))
        with pytest.raises(ArchitectureError, match="hf download org/a"):
            source.local_path(str(tmp_path))
