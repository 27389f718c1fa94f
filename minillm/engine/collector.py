"""What a process does about the garbage collector: a full walk would hold up every token for a tenth of a second."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["keep_what_is_there", "sparing_what_is_there"]


def keep_what_is_there() -> None:
    """Collect once, and spare the collector from now on what start-up made: for a process that is the engine's own."""
    gc.collect()
    gc.freeze()
    atexit.unregister(gc.unfreeze)  # once is enough
    atexit.register(gc.unfreeze)  # or extension modules would report as leaks what the last walk did not see


@contextmanager
def sparing_what_is_there() -> Iterator[None]:
    """In this block the collector walks only what came since, unless somebody in the process sees to it already."""
    is_ours = gc.get_freeze_count() == 0
    if is_ours:
        gc.freeze()
    try:
        yield
    finally:
        if is_ours:
            gc.unfreeze()
