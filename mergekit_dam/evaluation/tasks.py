"""Benchmarks of lm-eval, where it is installed."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_dam.errors import DamError, first_line
from mergekit_dam.tables import aligned


def require_lm_eval() -> None:
    """Refuse tasks where lm-eval is not installed.

    Raises:
        DamError: It says how to install it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise DamError(
            "--tasks hands over to lm-eval, which is not installed: "
            "pip install 'mergekit-dam[tasks]'"
        )


def run_tasks(
    models: Mapping[str, str],
    tasks: Sequence[str],
    *,
    device: str,
    dtype: str,
    batch_size: int,
    trust_remote_code: bool,
) -> dict[str, dict[str, dict[str, float]]]:
    """Run benchmarks.

    Args:
        models: Name -> folder or id on the Hub.
        tasks: Names of tasks that lm-eval knows, or YAML files of tasks.

    Returns:
        Model -> task -> metric -> value, as lm-eval calls them (`acc`, `acc_stderr`).

    Raises:
        DamError: lm-eval fails.
    """
    require_lm_eval()
    import lm_eval
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in tasks if Path(task).is_file()]
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
    names = [Path(task).stem if Path(task).is_file() else task for task in tasks]
    found = {}
    for name, model in models.items():
        arguments = {"pretrained": model, "dtype": dtype, "trust_remote_code": trust_remote_code}
        try:
            result: Any = lm_eval.simple_evaluate(
                model="hf",
                model_args=arguments,
                tasks=names,
                task_manager=manager,
                device=device,
                batch_size=batch_size,
                bootstrap_iters=0,
            )
        except Exception as error:  # unknown tasks, datasets that cannot be had
            raise DamError(
                f"--tasks: lm-eval failed with {name} ({type(error).__name__}: "
                f"{first_line(error)}); `lm-eval ls tasks` lists what it knows"
            ) from error
        found[name] = {task: _numbers(own) for task, own in result["results"].items()}
    return found


def _numbers(own: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a task by metric; lm-eval adds the name of a filter, `none` for none."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in own.items()
        if isinstance(value, (int, float)) and key not in ("alias", "sample_len")
    }


def tasks_table(
    found: Mapping[str, Mapping[str, Mapping[str, float]]], width: int | None = None
) -> str:
    """The metrics of every model as a table.

    Args:
        found: As `run_tasks` returns it.
        width: Columns of the terminal.
    """
    columns = [
        (task, metric)
        for task, own in next(iter(found.values())).items()
        for metric in own
        if "stderr" not in metric
    ]
    rows = [
        [model, *(f"{own[task][metric]:.3f}" for task, metric in columns)]
        for model, own in found.items()
    ]
    return aligned(["task", *(f"{task} {metric}" for task, metric in columns)], rows, width)
