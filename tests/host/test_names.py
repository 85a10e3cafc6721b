"""Names of paths, without a path of the machine."""

from pathlib import Path

import pytest
from mergekit.common import ModelReference

from mergekit_dam.host.names import Names, names_of, naming
from mergekit_dam.parameters import RunParameters
from mergekit_dam.request.check import Checked


def checked(*models: Path | str, text: Path | str | None = None) -> Checked:
    references = tuple(ModelReference.model_validate(str(model)) for model in models)
    texts = {} if text is None else {references[0]: str(text)}
    return Checked(RunParameters(), references, None, texts)


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def test_paths_are_relative_to_the_configuration(tmp_path: Path) -> None:
    beside = folder(tmp_path / "merge" / "a")
    above = folder(tmp_path / "models" / "b")
    with naming(tmp_path / "merge"):
        names = names_of(checked(beside, above, text=f"{tmp_path}/merge/t.jsonl:column=text"))
    assert names.text(str(beside)) == "a"
    assert names.text(str(above)) == "../models/b"
    assert names.text(f"{tmp_path}/merge/t.jsonl:column=text") == "t.jsonl:column=text"
    assert names.text(f"read {tmp_path}/merge/other/file.") == "read other/file."


def test_without_a_configuration_a_folder_is_called_by_its_last_names(tmp_path: Path) -> None:
    models = [folder(tmp_path / name) for name in ("a/step", "b/step", "c")]
    names = names_of(checked(*models))
    assert [names.text(str(model)) for model in models] == ["step", "b/step", "c"]


def test_relative_paths_and_repositories_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "models" / "a")
    monkeypatch.chdir(tmp_path)
    names = names_of(checked("models/a", "org/b@v1"))
    assert names.text("models/a") == names.text(f"{tmp_path}/models/a") == "models/a"
    assert names.of(ModelReference.model_validate("org/b@v1")) == "org/b@v1"


def test_an_adapter_is_named_with_its_base(tmp_path: Path) -> None:
    base, adapter = folder(tmp_path / "base"), folder(tmp_path / "adapters" / "x")
    own = f"{base}+{adapter}"
    names = names_of(checked(own))
    assert names.of(ModelReference.model_validate(own)) == names.text(own) == "base+x"


def test_a_path_is_no_part_of_a_longer_one(tmp_path: Path) -> None:
    models = [folder(tmp_path / name) for name in ("a", "a-b", "a.b")]
    names = names_of(checked(*models))
    for model in models:
        assert names.text(f"in {model}, and {model}.") == f"in {model.name}, and {model.name}."
    assert names.text(f"{models[0]}c") == f"{models[0]}c"


def test_names_that_are_given_are_kept(tmp_path: Path) -> None:
    model = folder(tmp_path / "moved")
    with naming(None, {str(model): "models/a", "org/b@0123": "org/b"}):
        names = names_of(checked(model, "org/b@0123"))
    assert names.text(str(model)) == "models/a"
    assert names.of(ModelReference.model_validate("org/b@0123")) == "org/b"


def test_keys_and_lists_of_plain_values_are_named_too(tmp_path: Path) -> None:
    model = folder(tmp_path / "a")
    names = Names({str(model): "a"})
    tree = {str(model): [1, None, (str(model), 2.5)], "x": {"y": f"{model}/f"}}
    assert names.tree(tree) == {"a": [1, None, ["a", 2.5]], "x": {"y": "a/f"}}
