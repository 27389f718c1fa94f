"""Line plots for the benchmarks, in a file. It knows numbers and labels; matplotlib comes with the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minillm.errors import ConfigError

__all__ = ["Panel", "check_picture", "save_picture"]

SUFFIXES = (".svg", ".png")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes, both logarithmic."""

    title: str
    x_label: str
    y_label: str
    lines: dict[str, list[tuple[float, float]]]
    """By label: points (x, y)."""


def check_picture(path: Path | None) -> None:
    """Raise ConfigError, before anything is measured, if a picture cannot be saved there."""
    if path is None:
        return
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"a picture is a file that ends in {' or '.join(SUFFIXES)}, not {str(path)!r}")
    if not path.parent.is_dir():
        raise ConfigError(f"the folder {str(path.parent)!r} is not there: make it, or give another")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("a picture needs matplotlib: pip install 'minillm[plot]'") from error


def save_picture(path: Path, panels: Sequence[Panel], caption: str) -> None:
    """Draw the panels side by side into `path`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "minillm", "font.size": 9}):
        figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for label, points in panel.lines.items():
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
            axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label, xscale="log", yscale="log")
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
            axes.legend()
        figure.supxlabel(caption, fontsize=7)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata)
