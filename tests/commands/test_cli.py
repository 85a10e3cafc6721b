"""The command line as a whole: help, exit codes, errors, what is told before slow imports."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mergekit_dam import __version__
from mergekit_dam.cli import main
from mergekit_dam.cli.group import COMMANDS
from mergekit_dam.command_line import Command
from tests.commands.conftest import Run
from tests.kit.processes import BIN

OWN = [name for name in COMMANDS if name != "merge"]
"""Commands whose help needs no other package; that of `merge` has mergekit's options."""


def helped(name: str, width: int = 80) -> str:
    runner = CliRunner()
    result = runner.invoke(main, [name, "--help"], prog_name="mergekit-dam", terminal_width=width)
    assert result.exit_code == 0
    return result.output


def test_help_names_every_command_with_a_whole_sentence(command: Run) -> None:
    result = command("--help")
    assert result.exit_code == 0
    listed = result.output.partition("Commands:")[2]
    assert [line.split()[0] for line in listed.strip().splitlines()] == list(COMMANDS)
    assert "..." not in listed  # short helps are not cut


def test_version(command: Run) -> None:
    assert command("--version").output == f"mergekit-dam, version {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command_has_an_example_exit_codes_json_and_debug(name: str) -> None:
    shown = helped(name)
    assert shown.startswith(f"Usage: mergekit-dam {name}")
    example, _, codes = shown.partition("Example:")[2].partition("Exit codes:")
    assert f"  mergekit-dam {name} " in example
    assert re.findall(r"^  (\d)  ", codes, re.MULTILINE) == ["0", "1", "2"]
    assert "--json" in shown
    assert "--debug" in shown


@pytest.mark.parametrize("name", OWN)
def test_help_fits_sixty_columns(name: str) -> None:
    assert max(map(len, helped(name, 60).splitlines())) <= 60


def test_help_loads_neither_torch_nor_mergekit() -> None:
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from mergekit_dam.cli import main\n"
        f"for name in {OWN}:\n"
        "    assert CliRunner().invoke(main, [name, '--help']).exit_code == 0\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'mergekit', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("plna",),
        ("evaluate", "./gone", "--data", "{text}"),
        ("evaluate", "org/a", "--data", "{text}:smaples=2"),
        ("evaluate", "org/a", "--data", "{text}", "--fail-if", "txet > 3"),
        ("plan", "{text}", "--gpu", "h1000"),
        ("init", "org/a"),
        ("inspect", "./gone"),
    ],
)
def test_a_typo_is_told_before_slow_imports(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Some text.\n")
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from mergekit_dam.cli import main\n"
        "result = CliRunner().invoke(main, sys.argv[1:])\n"
        "assert result.exit_code in (1, 2), result.output\n"
        "assert result.stderr and not result.stdout\n"
        "print(sorted({'torch', 'transformers', 'mergekit'} & set(sys.modules)))\n"
    )
    given = [own.format(text=tmp_path / "text.txt") for own in arguments]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_a_typo_in_a_configuration_is_told_at_once_and_then_with_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "dam.yaml"
    file.write_text(
        "merge_method: dam\nmodels:\n- {model: org/a, parameters: {calibration: gone.jsonl}}\n"
        "- {model: org/b, parameters: {calibration: self}}\nparameters: {sampels: 2, ridge: -1}\n"
    )
    started = time.perf_counter()
    with subprocess.Popen(
        [BIN / "mergekit-dam", "plan", file], stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stderr is not None
        early = [running.stderr.readline() for _ in range(4)]
        first = time.perf_counter() - started
        rest = running.stderr.read()
    assert "did you mean `samples`?" in early[1]
    assert "calibration of org/a: 'gone.jsonl': no file" in early[2]
    assert rest.startswith("Error: 3 problems in the dam configuration:\n")
    assert early[1] in rest
    assert early[2] in rest
    assert first < (time.perf_counter() - started) / 2


def test_an_error_is_one_line_on_stderr_and_has_a_traceback_with_debug(tmp_path: Path) -> None:
    (tmp_path / "dam_coefficients.safetensors").write_bytes(b"nothing")
    runner = CliRunner()
    plain, debug = (
        runner.invoke(main, ["inspect", str(tmp_path), *more]) for more in ([], ["--debug"])
    )
    assert plain.exit_code == debug.exit_code == 1
    assert plain.stdout == debug.stdout == ""
    assert plain.stderr.startswith("Error: ")
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr
    assert debug.stderr.endswith(plain.stderr)


def broken(error: BaseException, *arguments: str) -> str:
    def run() -> None:
        raise error

    result = CliRunner().invoke(Command("x", callback=run, example="x"), arguments)
    assert result.exit_code == 1
    return result.stderr


def test_an_error_that_nobody_expected_has_no_traceback_either() -> None:
    said = broken(ZeroDivisionError("by zero"))
    assert said.startswith("Error: ZeroDivisionError: by zero. This is not expected: --debug shows")
    assert "Traceback" in broken(ZeroDivisionError("by zero"), "--debug")


def test_an_interrupt_is_an_abort_even_where_a_library_made_an_error_of_it() -> None:
    assert broken(KeyboardInterrupt()) == "\nAborted!\n"
    error = ImportError("cannot import")
    error.__cause__ = KeyboardInterrupt()
    assert broken(error) == "Aborted!\n"


@pytest.mark.parametrize("name", ["plan", "evaluate"])
def test_device_and_cuda_contradict_each_other_only_where_they_differ(
    name: str, command: Run, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Some text.\n")
    data = ("--data", file) if name == "evaluate" else ()
    result = command(name, file, *data, "--device", "cuda:1", "--cuda")
    assert result.exit_code == 2
    assert "give one of them" in result.stderr


@pytest.mark.parametrize("name", ["plan", "evaluate"])
def test_a_file_for_json_is_refused_with_the_way_to_keep_it(
    name: str, command: Run, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Some text.\n")
    data = ("--data", file) if name == "evaluate" else ()
    result = command(name, file, *data, "--json", "out.json")
    assert result.exit_code == 2
    assert "--json prints on stdout: write `--json > " in result.stderr


def test_merge_shows_every_option_of_mergekit() -> None:
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    shown = helped("merge")
    assert "Usage: mergekit-dam merge [OPTIONS] CONFIG_FILE OUT_PATH" in shown
    for parameter in mergekit_yaml.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in shown


def test_merge_reports_a_missing_argument_as_mergekit_does(command: Run) -> None:
    result = command("merge")
    assert result.exit_code == 2
    assert "Missing argument 'CONFIG_FILE'" in result.output


def test_merge_refuses_an_unknown_option(command: Run) -> None:
    result = command("merge", "dam.yaml", "out", "--nonesuch")
    assert result.exit_code == 2
    assert "--nonesuch" in result.output


def test_merge_knows_dam_and_says_what_its_configuration_lacks(
    command: Run, tmp_path: Path
) -> None:
    config = tmp_path / "dam.yaml"
    config.write_text("merge_method: dam\nmodels:\n- model: a/model\n- model: b/model\n")
    result = command("merge", config, tmp_path / "out")
    assert result.exit_code == 1
    assert "required `calibration`" in result.output


def test_merge_says_in_json_what_it_has_written(
    command: Run, tmp_path: Path, configuration: dict[str, object]
) -> None:
    config = tmp_path / "dam.yaml"
    config.write_text(json.dumps(configuration))  # JSON is YAML
    result = command("merge", config, tmp_path / "out", "--quiet", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told == {
        "model": str(tmp_path / "out"),
        "report": str(tmp_path / "out" / "dam_report.json"),
        "coefficients": str(tmp_path / "out" / "dam_coefficients.safetensors"),
    }


def test_evaluate_needs_a_model_and_an_existing_text(command: Run, tmp_path: Path) -> None:
    assert "Missing argument 'MODEL...'" in command("evaluate").output
    missing = command("evaluate", "model", "--data", tmp_path / "nothing.txt")
    assert missing.exit_code == 1
    assert "no file or directory at" in missing.output
    assert "Missing option '--data'" in command("evaluate", "model").output
