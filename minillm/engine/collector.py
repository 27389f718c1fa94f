"""What a process does about the garbage collector: a full walk would hold up every token for a tenth of a second."""

from __future__ import annotations

import atexit
import gc

__all__ = ["keep_what_is_there"]


def keep_what_is_there() -> None:
    """Collect once, and spare the collector from now on what start-up made, of which nearly all stays.

    What is in use now is freed as ever when its last reference goes; only cycles among it are not found any more.
    """
    gc.collect()
    gc.freeze()
    atexit.unregister(gc.unfreeze)  # once is enough
    atexit.register(gc.unfreeze)  # or extension modules would report as leaks what the last walk did not see
