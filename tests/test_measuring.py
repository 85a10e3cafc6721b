"""What the benchmarks share: options, rows, models, tables, and a command that is measured."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from examples.benchmarks.measuring.models import resolve
from examples.benchmarks.measuring.options import parse_variant
from examples.benchmarks.measuring.processes import failure, run_measured
from mergekit_dam.errors import DamError
from tests.merging import tensors_of
from tests.test_parameters import save_adapter


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
        assert measured.status == 0 and measured.seconds > 0
        assert 1e6 < measured.peak_bytes < 100e6
        del held

    def test_memory_of_the_command_is(self, tmp_path):
        code = "held = b'x' * 200_000_000"
        measured = run_measured([sys.executable, "-S", "-c", code], tmp_path / "log")
        assert 200e6 < measured.peak_bytes < 300e6

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
