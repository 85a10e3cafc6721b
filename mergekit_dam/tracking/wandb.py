"""Weights & Biases: a run for every run of a merge.

Its own environment variables say where it goes: WANDB_MODE, WANDB_PROJECT, WANDB_DIR and others.
"""

import os
from collections.abc import Mapping
from typing import Any

import wandb

from mergekit_dam.errors import DamError, first_line

_PROJECT = "mergekit-dam"
"""Project where the environment names none."""


class WeightsAndBiases:
    """Sends the numbers of a run, and nothing else: no output, code or name of this machine.

    Args:
        configuration: what is merged, as plain values.
        quiet: whether nothing is printed.

    Raises:
        DamError: no run can be begun, such as without a key.
    """

    def __init__(self, configuration: Mapping[str, Any], *, quiet: bool) -> None:
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            quiet=True,
            silent=quiet,
        )
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                job_type="merge",
                config=dict(configuration),
                settings=settings,
            )
        except wandb.Error as error:
            raise DamError(
                f"`tracking: wandb`: required a run that can be begun, and wandb says "
                f"{first_line(error)!r}; call `wandb login`, or set WANDB_MODE=offline"
            ) from error
        self._groups = set[str]()

    def put(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Send numbers; the steps of their group are its own axis."""
        if group not in self._groups:
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
            self._groups.add(group)
        named = {f"{group}/{name}": value for name, value in values.items()}
        self._run.log({**named, f"{group}/step": step})

    def close(self, *, failed: bool) -> None:
        """Send all that was not sent yet, and say how it ended."""
        self._run.finish(exit_code=int(failed))
