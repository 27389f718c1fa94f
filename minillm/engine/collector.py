"""What a process does about the garbage collector: a full walk would hold up every token for a tenth of a second."""

from __future__ import annotations

import atexit
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["keep_what_is_there", "sparing_what_is_there"]

_LOCK = threading.Lock()
_NUM_SPARING = 0
_IS_OURS = False
"""Whether the outermost block froze what was there, and is to give it back."""


def keep_what_is_there() -> None:
    """Collect once, and spare the collector from now on what start-up made: for a process that is the engine's own."""
    gc.collect()
    gc.freeze()
    atexit.unregister(gc.unfreeze)  # once is enough
    atexit.register(gc.unfreeze)  # or extension modules would report as leaks what the last walk did not see


@contextmanager
def sparing_what_is_there() -> Iterator[None]:
    """In this block the collector walks only what came since, unless the process has decided about it already."""
    global _NUM_SPARING, _IS_OURS
    with _LOCK:
        _NUM_SPARING += 1
        if _NUM_SPARING == 1:
            _IS_OURS = gc.get_freeze_count() == 0
            if _IS_OURS:
                gc.freeze()
    try:
        yield
    finally:
        with _LOCK:
            _NUM_SPARING -= 1
            if not _NUM_SPARING and _IS_OURS:
                gc.unfreeze()
