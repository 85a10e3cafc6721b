"""The command line: help without heavy imports, and mergekit's own command behind `merge`."""

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from mergekit_dam import __version__
from mergekit_dam.cli import main


def run(*arguments):
    return CliRunner().invoke(main, arguments)


def test_help_names_every_command():
    result = run("--help")
    assert result.exit_code == 0
    for name in ("merge", "plan", "demo", "evaluate"):
        assert f"\n  {name} " in result.output
    assert "..." not in result.output.partition("Commands:")[2]  # short helps are not cut


def test_version():
    assert run("--version").output == f"mergekit-dam, version {__version__}\n"


@pytest.mark.parametrize("command", ["plan", "demo", "evaluate"])
def test_each_command_has_help(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: main {command}")


def test_help_loads_neither_torch_nor_mergekit():
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from mergekit_dam.cli import main\n"
        "for arguments in (['--help'], ['plan', '--help'], ['evaluate', '--help']):\n"
        "    assert CliRunner().invoke(main, arguments).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'mergekit'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_merge_shows_every_option_of_mergekit():
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    result = run("merge", "--help")
    assert result.exit_code == 0
    assert "Usage: main merge [OPTIONS] CONFIG_FILE OUT_PATH" in result.output
    for parameter in mergekit_yaml.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in result.output


def test_merge_reports_a_missing_argument_as_mergekit_does():
    result = run("merge")
    assert result.exit_code == 2
    assert "Missing argument 'CONFIG_FILE'" in result.output


def test_merge_refuses_an_unknown_option():
    result = run("merge", "dam.yaml", "out", "--nonesuch")
    assert result.exit_code == 2
    assert "--nonesuch" in result.output


def test_merge_knows_dam_and_says_what_its_configuration_lacks(tmp_path):
    config = tmp_path / "dam.yaml"
    config.write_text("merge_method: dam\nmodels:\n- model: a/model\n- model: b/model\n")
    result = run("merge", str(config), str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "required `calibration`" in result.output


def test_evaluate_needs_a_model_and_an_existing_text(tmp_path):
    assert "Missing argument 'MODEL...'" in run("evaluate").output
    missing = run("evaluate", "model", "--data", str(tmp_path / "nothing.txt"))
    assert missing.exit_code == 2
    assert "does not exist" in missing.output
    assert "Missing option '--data'" in run("evaluate", "model").output
