"""Measured peaks of memory: the most that was allocated at once while some work ran. It knows no model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes"]


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes that `work` held at once beyond what was allocated before, what it returns included.

    On a GPU the allocator counts. On a CPU the profiler is told of each allocation of PyTorch's, those within its
    kernels too; buffers of matrix libraries are not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = work()
    del kept  # it lived until now: had it gone before, its end would have been counted
    results = profiled.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return int(most)
