"""Counters of an engine, pure sums: what was asked, computed, cached and preempted. It knows no exporter."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Metrics:
    """Totals since the engine started, and figures of the moment in which they are read."""

    num_requests: int = 0
    num_finished: int = 0
    num_steps: int = 0
    num_batched_tokens: int = 0
    """Tokens computed, prompts and outputs together."""
    num_prompt_tokens: int = 0
    """Prompt tokens of finished requests, cached ones included."""
    num_cached_tokens: int = 0
    """Prompt tokens of finished requests that came from the prefix cache."""
    num_output_tokens: int = 0
    """Output tokens of finished requests, with those computed before a stop string was seen."""
    num_preemptions: int = 0
    num_drafts: int = 0
    """Drafts of finished requests that were verified."""
    num_accepted_drafts: int = 0
    """Those that held."""
    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    """Blocks that requests hold, as a share of all."""
    kv_utilization: float = 0.0
    """Slots in use, as a share of the slots of blocks that requests hold."""
    device_seconds: float = 0.0
    """Time that steps took on the device."""

    jit_compiles: int = 0
    """Kernels that this process compiled or read from the compiler's cache: none once it is warm."""
    graph_captures: int = 0
    """CUDA graphs captured: none once the engine has started."""

    def as_dict(self) -> dict[str, int | float]:
        """All figures by name."""
        return asdict(self)
