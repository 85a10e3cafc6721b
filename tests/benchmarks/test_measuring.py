"""The shared parts of benchmarks: options, rows, models, tables, and a measured command."""

import os
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import torch
import yaml

from examples.benchmarks.measuring.machine import machine
from examples.benchmarks.measuring.merges import Point, configuration, merge_command
from examples.benchmarks.measuring.models import resolve
from examples.benchmarks.measuring.options import named_paths, output_folder, parse_variant
from examples.benchmarks.measuring.processes import failure, run_measured
from examples.benchmarks.measuring.selection import chosen, refuse_repeated
from mergekit_dam.errors import DamError
from tests.kit.adapters import save_adapter
from tests.kit.merging import tensors_of

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="counted where there is /proc")


class TestOptions:
    def test_a_variant_is_read(self):
        assert parse_variant("sens: metric=sensitivity, ridge=1e-3, norms=false, samples=8") == (
            "sens",
            {"metric": "sensitivity", "ridge": 0.001, "norms": False, "samples": 8},
        )
        assert parse_variant("plain:") == ("plain", {})

    @pytest.mark.parametrize("text", ["sens", "sens ridge=1", ": ridge=1", "sens: ridge", "s: =1"])
    def test_a_variant_written_otherwise_is_refused(self, text):
        with pytest.raises(DamError, match="write 'name: key=value, key=value'"):
            parse_variant(text)

    def test_paths_are_named_once(self):
        assert named_paths(["a=x", "b=y=z"], "--model") == {"a": "x", "b": "y=z"}
        for pairs in (["a"], ["=x"], ["a="], ["a=x", "a=y"]):
            with pytest.raises(click.UsageError, match=r"--model .*: write NAME=PATH"):
                named_paths(pairs, "--model")

    @pytest.mark.parametrize("name", ["a+b", "a@b"])
    def test_a_folder_that_mergekit_would_misread_is_refused(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert output_folder(Path("out")) == tmp_path / "out"
        with pytest.raises(DamError, match=r"has a \+ or @"):
            output_folder(Path(name))


class TestRows:
    def test_rows_are_chosen_by_name_but_for_those_that_always_run(self):
        def rows(only=(), skip=()):
            return sorted(chosen(["one", "two", "three"], only=only, skip=skip, always=("one",)))

        assert rows() == ["one", "three", "two"]
        assert rows(only=("three",)) == ["one", "three"]
        assert rows(only=("t*",), skip=("*o", "one")) == ["one", "three"]
        with pytest.raises(DamError, match="no row is named 'tow'; there are one, two, three"):
            rows(skip=("tow",))

    def test_a_name_is_taken_once(self):
        refuse_repeated(["one", "two"])
        with pytest.raises(DamError, match="a row named base, two is there already"):
            refuse_repeated(["two", "base", "two"], taken=("base",))


class TestMerges:
    def test_a_replay_is_given_no_text(self):
        text = configuration(
            Point(method="dam", parameters={"coefficients": "/saved"}),
            {"a": "/a", "b": "/b"},
            base="/base",
            calibrations={"a": "a.jsonl", "b": "b.jsonl"},
            samples=4,
            sequence_length=16,
            dtype="float32",
        )
        assert yaml.safe_load(text) == {
            "merge_method": "dam",
            "base_model": "/base",
            "models": [{"model": "/a"}, {"model": "/b"}],
            "parameters": {"coefficients": "/saved"},
            "dtype": "float32",
        }

    def test_the_command_is_mergekits(self):
        config, out = Path("dam.yaml"), Path("out")
        plain = merge_command(config, out, device="cpu", seed=3)
        assert plain[1:5] == ["-m", "mergekit.scripts.run_yaml", "dam.yaml", "out"]
        assert plain[5:] == ["--random-seed", "3"]
        more = merge_command(config, out, device="cuda:1", seed=3, options=["--quiet"])
        assert more[len(plain) :] == ["--device", "cuda:1", "--quiet"]


class TestMachine:
    def test_a_report_says_where_it_was_made(self):
        found = machine()
        assert found["threads"] == torch.get_num_threads()
        assert f"{os.cpu_count()} cores" in found["processor"]
        assert f"torch {torch.__version__}" in found["versions"]
        assert float(found["memory"].removesuffix(" GB")) > 0.1


class TestModels:
    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
    def test_an_adapter_is_merged_once_and_has_a_tokenizer(self, llama_models, tmp_path):
        adapter = save_adapter(llama_models.base, tmp_path / "adapter")
        name = f"{llama_models.base}+{adapter}"
        merged = Path(resolve(name, tmp_path / "cache"))
        base, own = tensors_of(llama_models.base), tensors_of(merged)
        assert own.keys() == base.keys()
        assert any(not torch.equal(own[key], base[key]) for key in base)
        written = (merged / "model.safetensors").stat().st_mtime_ns
        assert Path(resolve(name, tmp_path / "cache")) == merged
        assert (merged / "model.safetensors").stat().st_mtime_ns == written
        assert (merged / "tokenizer_config.json").is_file()

    def test_an_adapter_that_fails_leaves_nothing_behind(self, llama_models, tmp_path):
        (tmp_path / "adapter").mkdir()
        name = f"{llama_models.base}+{tmp_path / 'adapter'}"
        with pytest.raises(DamError, match=r"the adapter of .* cannot be merged"):
            resolve(name, tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []

    def test_a_folder_becomes_absolute_and_an_id_stays(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "model").mkdir()
        assert resolve("model", tmp_path) == str(tmp_path / "model")
        assert resolve("org/model", tmp_path) == "org/model"


class TestProcesses:
    def test_memory_of_this_process_is_not_counted(self, tmp_path):
        held = b"x" * 400_000_000
        measured = run_measured([sys.executable, "-S", "-c", "pass"], tmp_path / "log")
        assert measured.status == 0
        assert measured.seconds > 0
        assert 1e6 < measured.peak_bytes < 100e6
        del held

    def test_memory_of_the_command_is(self, tmp_path):
        code = "held = b'x' * 200_000_000"
        measured = run_measured([sys.executable, "-S", "-c", code], tmp_path / "log")
        assert 200e6 < measured.peak_bytes < 300e6

    @LINUX
    def test_mapped_files_are_not_counted_as_own_memory(self, tmp_path):
        (tmp_path / "file").write_bytes(b"x" * 100_000_000)
        code = (
            "import mmap, time\n"
            f"file = open({str(tmp_path / 'file')!r}, 'rb')\n"
            "mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
            "assert mapped.find(b'y') == -1\n"
            "held = b'x' * 50_000_000\n"
            "time.sleep(0.3)"
        )
        measured = run_measured([sys.executable, "-S", "-c", code], tmp_path / "log")
        assert measured.status == 0
        assert measured.own_peak_bytes is not None
        assert measured.peak_bytes > 150e6
        assert 50e6 < measured.own_peak_bytes < 100e6
        assert measured.read_bytes is not None
        assert measured.read_bytes < 50e6

    @LINUX
    def test_bytes_read_and_written_are_counted(self, tmp_path):
        (tmp_path / "file").write_bytes(b"x" * 3_000_000)
        copy = (
            "import pathlib, sys; a, b = map(pathlib.Path, sys.argv[1:]);"
            "b.write_bytes(a.read_bytes())"
        )
        files = [str(tmp_path / "file"), str(tmp_path / "copy")]
        measured = run_measured([sys.executable, "-S", "-c", copy, *files], tmp_path / "log")
        assert measured.status == 0
        assert measured.read_bytes is not None
        assert measured.written_bytes is not None
        assert 3e6 <= measured.read_bytes < 8e6
        assert 3e6 <= measured.written_bytes < 3.1e6

    @pytest.mark.parametrize(
        ("code", "status", "reason"),
        [
            ("pass", 0, ""),
            ("import sys; print('Error: two', 'lines:', sep='\\n'); sys.exit(1)", 1, "lines:"),
            ("raise ValueError('no such thing')", 1, "ValueError: no such thing"),
            ("import sys; sys.exit(3)", 3, "exit status 3"),
            ("import os; os.kill(os.getpid(), 9)", -9, "ended by signal 9"),
        ],
    )
    def test_a_failure_has_its_reason(self, code, status, reason, tmp_path):
        measured = run_measured([sys.executable, "-c", code], tmp_path / "log")
        assert measured.status == status
        found = failure(measured, tmp_path / "log")
        assert (reason in found) if reason else not found

    def test_an_interrupt_ends_the_command(self, tmp_path, monkeypatch):
        code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
        monkeypatch.setattr(subprocess, "Popen", interrupted_popen(tmp_path / "pid"))
        with pytest.raises(KeyboardInterrupt):
            run_measured([sys.executable, "-c", f"{code}; time.sleep(60)"], tmp_path / "log")
        pid = int((tmp_path / "pid").read_text())
        assert eventually(lambda: not Path(f"/proc/{pid}/cmdline").exists() or is_dead(pid))


def interrupted_popen(started):
    """A Popen whose first wait is interrupted as soon as the file `started` is written."""

    class Interrupted(subprocess.Popen):
        first = True

        def wait(self, timeout=None):
            if self.first:
                self.first = False
                assert eventually(lambda: started.is_file() and started.read_text())
                raise KeyboardInterrupt
            return super().wait(timeout)

    return Interrupted


def eventually(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def is_dead(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
