"""The examples for a CI job, run as its shell would run them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.kit.projects import Project

CI = Path(__file__).parents[2] / "examples" / "ci"
CODE = "import sys; from mergekit_dam.cli import main; sys.exit(main())"


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH with the commands of this checkout."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, words in (("mergekit-dam", f"-c '{CODE}'"), ("python", "")):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def run(project: Project, path: str, bound: float) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(CI.parents[1]),
        "OUT": "again",
        "EVALUATE": "--sequence-length 16 --sequences 4",
        "HF_HUB_OFFLINE": "1",
    }
    shutil.rmtree(project.root / "again", ignore_errors=True)
    text = "texts/calibration_0.jsonl"
    return subprocess.run(
        [CI / "reproduce.sh", "out", text, str(bound), "--models", "models"],
        cwd=project.root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_script_passes_fails_above_the_bound_and_where_the_merge_differs(
    project: Project, path: str
) -> None:
    done = run(project, path, 100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "byte-identical: 21 tensors" in done.stdout
    assert "tensors and 9 files are as dam_lock.json says" in done.stdout
    assert "nats per token, at most 100 allowed" in done.stdout
    assert run(project, path, 0.01).returncode == 1
    lock = project.out.path / "dam_lock.json"
    values = json.loads(lock.read_text("utf-8"))
    values["output"]["tensors"]["lm_head.weight"]["sha256"] = 64 * "0"
    lock.write_text(json.dumps(values), encoding="utf-8")
    done = run(project, path, 100)
    assert done.returncode == 1
    assert "replayed: 1 differences from the lock:" in done.stdout
    assert "nats per token" not in done.stdout


def test_the_workflow_runs_the_script_on_its_merges() -> None:
    workflow = yaml.safe_load((CI / "reproduce.yml").read_text("utf-8"))
    (job,) = workflow["jobs"].values()
    last = job["steps"][-1]["run"]
    assert last.split()[0] == ".github/workflows/reproduce.sh"
    assert len(last.split("${{")) == 3
    assert {own["merge"] for own in job["strategy"]["matrix"]["include"]} == set(
        job["strategy"]["matrix"]["merge"]
    )
