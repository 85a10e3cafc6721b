"""Events for TensorBoard, as its own reader finds them."""

import math
import socket
from pathlib import Path

from mergekit_dam.tracking.tensorboard import TensorBoard
from tests.kit.tracked import curves_of, text_of


def test_numbers_and_the_configuration_are_read_back(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, "samples: 4\nmodels: [a]\n")
    for step in range(3):
        board.put("layer_fits", {"before": 0.5 * step, "after": 0.25 * step}, step)
    board.put("trials", {"KL_a": math.inf}, 0)
    board.close(failed=False)
    assert curves_of(tmp_path / "run-1") == {
        "layer_fits/before": [(0, 0.0), (1, 0.5), (2, 1.0)],
        "layer_fits/after": [(0, 0.0), (1, 0.25), (2, 0.5)],
        "trials/KL_a": [(0, math.inf)],
    }
    assert text_of(tmp_path / "run-1", "configuration") == "    samples: 4\n    models: [a]\n"


def test_a_run_that_continues_has_a_folder_of_its_own(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        board = TensorBoard(tmp_path, "")
        board.put("trials", {"KL": value}, 0)
        board.close(failed=value == 1.0)
    assert [curves_of(tmp_path / f"run-{n}")["trials/KL"] for n in (1, 2)] == [
        [(0, 1.0)],
        [(0, 2.0)],
    ]


def test_no_file_names_the_machine_even_where_a_run_was_killed(tmp_path: Path) -> None:
    killed = tmp_path / "run-1" / f"events.out.tfevents.17.{socket.gethostname()}.99.0"
    killed.parent.mkdir()
    killed.touch()
    TensorBoard(tmp_path, "").close(failed=False)
    names = sorted(file.name for file in tmp_path.rglob("*") if file.is_file())
    assert names[0] == "events.out.tfevents.17"
    assert len(names) == 2
    assert all(name.removeprefix("events.out.tfevents.").isdigit() for name in names)
