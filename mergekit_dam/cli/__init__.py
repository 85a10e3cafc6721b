"""The command `mergekit-dam`, with a file for each of its subcommands.

May import: everything. Start reading at `group`; `command_line` has what the commands share. Slow
imports stand inside the commands, so that help and usage errors appear at once.
"""

import sys

try:
    from mergekit_dam.cli.group import main as main
except KeyboardInterrupt:  # before click can say so
    sys.stderr.write("\nAborted!\n")
    raise SystemExit(1) from None
