"""The command line's surface is frozen: commands, arguments and options as in surface.txt.

A wanted change: `python -m tests.cli.test_surface > tests/cli/surface.txt`, and read the difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from minillm.cli import app

SURFACE = Path(__file__).parent / "surface.txt"


def surface(command: Any, path: str = "minillm") -> Iterator[str]:
    """One line per command: its path, arguments and options, in the order of its help."""
    names = [" / ".join([*p.opts, *p.secondary_opts]) for p in command.params if p.name != "help"]
    yield " ".join([path, *(f"[{name}]" for name in names)])
    for name, child in getattr(command, "commands", {}).items():
        yield from surface(child, f"{path} {name}")


def test_surface_is_frozen() -> None:
    assert list(surface(typer.main.get_command(app))) == SURFACE.read_text().splitlines()


if __name__ == "__main__":
    print("\n".join(surface(typer.main.get_command(app))))
