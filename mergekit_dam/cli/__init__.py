"""The command `mergekit-dam`, with a file for each of its subcommands.

May import: everything. Start reading at `group`; `command_line` has what the commands share. Slow
imports stand inside the commands, so that help and usage errors appear at once.
"""

from mergekit_dam.cli.group import main as main
