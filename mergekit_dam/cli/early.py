"""What is wrong with a configuration at first sight, told before slow imports."""

from pathlib import Path

import click


def tell_early(file: Path) -> None:
    """Print what can be told at once; the whole check comes seconds later, and repeats it."""
    from mergekit_dam.request.early import early_problems

    problems = early_problems(file)
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        click.echo(f"{file}, at first sight:{lines}\nChecking the rest ...", err=True)
