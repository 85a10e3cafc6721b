"""The command `merge`: mergekit's own, by the name of this package."""

from pathlib import Path
from typing import Any

import click

from mergekit_dam.cli.early import tell_early
from mergekit_dam.command_line import Command, json_option, print_json

_HELP = """Merge models, as mergekit-yaml does.

For one command that does all, and for installations in which mergekit-yaml does not find
plugins. The arguments and options are those of mergekit-yaml."""


class _Merge(click.Command):
    """Becomes mergekit's command when it is run: its options are not known before."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> click.Context:
        for argument in args:
            if Path(argument).is_file():
                tell_early(Path(argument))
                break
        return _command().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        return ctx.command.invoke(ctx)


def _command() -> click.Command:
    """Mergekit's command, with our help, `--json` and `--debug`."""
    from mergekit_dam.host import plugin

    plugin.install()
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    @json_option
    def run(as_json: bool, **arguments: Any) -> None:
        assert mergekit_yaml.callback is not None
        mergekit_yaml.callback(**arguments)
        if as_json:
            print_json(_written(Path(arguments["out_path"])))

    return Command(
        "merge",
        params=[*mergekit_yaml.params, *run.__click_params__],  # type: ignore[attr-defined]
        callback=run,
        help=_HELP,
        example="mergekit-dam merge dam.yaml ./out --cuda",
    )


def _written(folder: Path) -> dict[str, Any]:
    """What a merge has written, for programs."""
    from mergekit_dam.coefficients.file import FILE_NAME, REPORT_NAME

    named = {"report": REPORT_NAME, "coefficients": FILE_NAME}
    found = {key: folder / name for key, name in named.items()}
    return {
        "model": str(folder),
        **{key: str(file) if file.is_file() else None for key, file in found.items()},
    }


merge = _Merge("merge", help=_HELP)
