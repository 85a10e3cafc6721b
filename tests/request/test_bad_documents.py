"""Files that are no configuration, or a wrong one: refused as one error, before mergekit parses."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from mergekit.scripts.multimerge import main as mergekit_multi
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_dam.errors import ConfigError
from mergekit_dam.host.plugin import install, on_import
from mergekit_dam.request.document import DEEPEST, MOST_VALUES, parse
from mergekit_dam.request.reading import read_configuration, refuse_unreadable

GOOD = "merge_method: dam\nmodels: [{model: a}, {model: b}]\n"
MODELS = "models: [{model: a}, {model: b}]\n"


def dam(text: str) -> bytes:
    return f"merge_method: dam\n{text}".encode()


BOMB = "".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9)}]\n" for i in range(1, 12))

BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "required a mapping with `merge_method: dam`"),
    "comment alone": (b"# later\n", "got an empty document"),
    "a list": (b"- merge_method: dam\n", "got a list"),
    "a text": (b"dam", "got a text"),
    "a number": (b"5", "got a int"),
    "tabs": (dam("models:\n\t- model: a\n"), "indent with spaces, not with tabs"),
    "Latin-1": (dam("models: [{model: caf\xe9}]").decode().encode("latin-1"), "as in Latin-1"),
    "UTF-16": (GOOD.encode("utf-16"), "got UTF-16 or binary data; save the file as UTF-8"),
    "UTF-16 without a mark": (GOOD.encode("utf-16-le"), "got UTF-16 or binary data"),
    "a zero byte": (dam("models: \0"), "binary data"),
    "a control character": (dam("models: \x07"), "no readable YAML"),
    "a Python tag": (dam("models: !!python/object/apply:os.getcwd []"), "remove the tag"),
    "a local tag": (dam("models: !mine [a]"), "remove the tag"),
    "an open bracket": (dam("models: ["), "line 2"),
    "an open quote": (dam("models: 'a"), "line 2"),
    "an unquoted colon": (dam("base_model: a: b"), "mapping values are not allowed"),
    "an unquoted at sign": (dam("base_model: @a"), "needs quotes"),
    "entries in other columns": (dam("models:\n  - model: a\n - model: b\n"), "line 4"),
    "an unknown alias": (dam("models: *mine"), "undefined alias"),
    "an anchor twice in one place": (dam("models: &a &b []"), "line 2"),
    "a merge of a text": (dam("parameters: {<<: a}"), "expected a mapping"),
    "a list as a key": (dam("? [a]\n: b\n"), "line 2"),
    "a date of month 13": (
        dam("base_model: 2024-13-01"),
        "line 2, column 13: '2024-13-01' is no value of the tag timestamp",
    ),
    "a number of 5000 digits": (
        dam(f"parameters: {{samples: {'1' * 5000}}}"),
        "is no value of the tag int",
    ),
    "a tag that its value does not fit": (dam("base_model: !!bool x"), "of the tag bool; a config"),
    "a tag without a value": (dam("base_model: !!int"), "line 2, column 13: '' is no value of the"),
    "UTF-32": (dam("models: []").decode().encode("utf-32"), "got UTF-16 or binary data"),
    "a byte that ends no character": (dam("base_model: a") + b"\xff", "got the byte 0xFF"),
    "too deep": (dam(f"models: {'[' * 3000}"), f"at most {DEEPEST} levels"),
    "too deep in mappings": (dam(f"models: {'{a: ' * 3000}"), f"at most {DEEPEST} levels"),
    "aliases that expand": (dam("k0: &k0 [1, 2]\n" + BOMB), f"at most {MOST_VALUES:,} values"),
    "an alias of itself": (dam("models: &m [*m]"), "refers to itself"),
    "a mapping of itself": (dam("parameters: &p {ridge: *p}"), "refers to itself"),
    "models twice": (dam(MODELS + MODELS), "line 3: `models` stands in line 2 already"),
    "dtype twice": (dam("dtype: float16\n" + MODELS + "dtype: float32\n"), "`dtype` stands"),
    "a method twice": (b"merge_method: linear\n" + GOOD.encode(), "`merge_method` stands"),
    "a parameter twice": (dam(MODELS + "parameters: {ridge: 1, ridge: 2}"), "`ridge` stands"),
    "a calibration twice": (
        dam("models: [{model: a, parameters: {calibration: a, calibration: b}}]"),
        "`calibration` stands",
    ),
    "two documents": ((GOOD + "---\n" + GOOD).encode(), "required one YAML document, got 2"),
    "DAM": (GOOD.replace("dam", "DAM").encode(), "required `merge_method: dam`, got `DAM`"),
    "Dam": (GOOD.replace("dam", "Dam").encode(), "got `Dam`"),
    "no method": (MODELS.encode(), "names no `merge_method`"),
    "an empty method": (b"merge_method:\n" + MODELS.encode(), "merge_method: input should be"),
    "a list of methods": (b"merge_method: [dam]\n" + MODELS.encode(), "merge_method: input should"),
    "no models": (dam("dtype: float32"), "required `models` (or `slices`, or `modules`)"),
    "models of nothing": (dam("models:"), "required `models`"),
    "no model in models": (dam("models: []"), "required `models`"),
    "models as a mapping": (dam("models: {model: a}"), "models: input should be a valid list"),
    "models as a text": (dam("models: a, b"), "models: input should be a valid list, got text"),
    "models as names": (dam("models: [a, b]"), "models[0]: input should be a valid dictionary"),
    "a model without a name": (dam("models: [{parameters: {}}]"), "models[0]: required `model`"),
    "a model that is a number": (dam("models: [{model: 5}]"), "models[0].model"),
    "a model that is empty": (dam("models: [{model: }]"), "models[0].model"),
    "a model with two @": (dam("models: [{model: a@b@c}]"), "multiple @"),
    "a model with two +": (dam("models: [{model: a+b+c}]"), "Can't parse a+b+c"),
    "models and slices": (
        dam(MODELS + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]"),
        "got models and slices",
    ),
    "models and modules": (dam(MODELS + "modules: {a: {models: [{model: a}]}}"), "and modules"),
    "a module of nothing": (dam("modules: {a: {}}"), "either output slices or models"),
    "slices without sources": (dam("slices: [{}]"), "slices[0]: required `sources`"),
    "a source without layers": (
        dam("slices: [{sources: [{model: a}]}]"),
        "slices[0].sources[0]: required `layer_range`",
    ),
    "a range of three": (
        dam("slices: [{sources: [{model: a, layer_range: [0, 1, 2]}]}]"),
        "slices[0].sources[0].layer_range",
    ),
    "a range of texts": (
        dam("slices: [{sources: [{model: a, layer_range: [a, b]}]}]"),
        "slices[0].sources[0].layer_range[0]",
    ),
    "parameters as a list": (dam(MODELS + "parameters: [ridge]"), "parameters: input should be"),
    "a parameter that is empty": (
        dam(MODELS + "parameters: {ridge: }"),
        "parameters.ridge: required a number",
    ),
    "a parameter that is a mapping": (
        dam("models: [{model: a, parameters: {weight: {a: 1}}}]"),
        "models[0].parameters.weight: required a number",
    ),
    "both tokenizers": (dam(MODELS + "tokenizer_source: base\ntokenizer: {}"), "tokenizer_source"),
    "a tokenizer of a list": (dam(MODELS + "tokenizer: [union]"), "tokenizer: input should be"),
    "a dtype that is a number": (dam(MODELS + "dtype: 16"), "dtype: input should be a valid str"),
    "several at once": (dam("models: [{model: 5}]\nweight: 1\ndtyp: 2\n"), "3 problems"),
}


@pytest.fixture(scope="module", autouse=True)
def hooked() -> None:
    import mergekit.scripts.multimerge
    import mergekit.scripts.run_yaml

    install()
    on_import(mergekit.scripts.run_yaml)
    on_import(mergekit.scripts.multimerge)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_the_stock_command(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    result = CliRunner().invoke(mergekit_yaml, [str(file), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)  # the message alone, no traceback
    assert "in the dam configuration" in result.output
    assert f"{file}: " in result.output
    assert message in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in BAD if name != "two documents"])
def test_a_bad_file_is_refused_by_the_plan_and_by_mergekit_multi(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_configuration(file)
    assert message in error.value.message
    with pytest.raises(ConfigError) as error:
        refuse_unreadable(file, several=True)
    assert message in error.value.message


@pytest.mark.parametrize(
    "content",
    [
        b"merge_method: linear\nmodels: [",
        b"merge_method: linear\nmodels: {a: b}\n",
        b"merge_method: linear\nmerge_method: ties\n" + MODELS.encode(),
        "merge_method: slerp\nbase_model: caf\xe9".encode("latin-1"),
        "merge_method: ties".encode("utf-16"),
    ],
)
def test_files_of_other_methods_are_left_to_mergekit(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    refuse_unreadable(file, several=False)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(mergekit_yaml, [str(tmp_path / "no.yaml"), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "no.yaml: cannot be read (No such file or directory)" in result.output


def test_mergekit_multi_names_the_document_that_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"name: a\n{GOOD}---\nmerge_method: dam\nmodels: null\n", encoding="utf-8")
    result = CliRunner().invoke(
        mergekit_multi, [str(file), "-I", str(tmp_path / "steps"), "--out-path", "out"]
    )
    assert (result.exit_code, type(result.exception)) == (1, SystemExit)
    assert "required `models`" in result.output


def test_anchors_merge_keys_a_bom_and_names_are_taken_as_real_files_have_them(
    tmp_path: Path,
) -> None:
    file = tmp_path / "c.yaml"
    text = (
        "name: mine\nshared: &p {ridge: 0.1}\nfirst: &a org/a\n"
        "merge_method: dam\nmodels: [{model: *a}, {model: b}]\nparameters: {<<: *p, ridge: 0.2}\n"
    )
    file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    config, document = read_configuration(file)
    assert config.parameters == {"ridge": 0.2}
    assert [str(entry.model) for entry in config.models or ()] == ["org/a", "b"]
    assert document.anchored == {"shared", "first"}


def test_as_many_values_as_are_allowed_are_parsed() -> None:
    depth = DEEPEST - 3
    (document,) = parse("a: " + "[" * depth + "]" * depth)
    assert str(document.tree).count("[") == depth
