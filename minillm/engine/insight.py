"""What a front end may ask of a running engine: its steps, its requests, its blocks, its figures. Plain values, ids,
never contents. Each query is answered between two steps, on the engine's own thread, or begun there: long answers are
JSON text in pieces, to be taken a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from minillm.engine.engine import Engine
from minillm.engine.explain import explain, state_of
from minillm.engine.recorder import RecordingScheduler
from minillm.engine.timeline import StepRecord, Story
from minillm.engine.trace import trace

__all__ = ["Insight"]

MAX_STEPS = 256
MAX_REQUESTS = 256
MAX_DECODES = 64
MAX_CELLS = 1024
MAX_ENDED = 64


class Insight:
    """The queries of one engine. `numbers`: the engine's number of a request by its front end's key."""

    def __init__(self, engine: Engine, numbers: Mapping[int, int]) -> None:
        self.engine, self._numbers = engine, numbers
        self.queries: dict[str, Callable[..., Any]] = {
            "explain": self.explain,
            "feed": self.feed,
            "figures": self.figures,
            "recording": self.recording,
            "trace": self.trace,
        }

    def explain(self, key: int | None = None, number: int | None = None) -> dict[str, Any] | None:
        """Why a request, named by its key or its number, took as long as it did; None if it is not known (any more)."""
        number = number if key is None else self._numbers.get(key)
        return None if number is None else explain(self.engine.timeline, number, self.engine.clock())

    def trace(self) -> Iterator[str]:
        """The last steps for Perfetto."""
        return trace(self.engine.timeline)

    def recording(self) -> Iterator[str] | None:
        """The flight recording; None if there is no recorder."""
        scheduler = self.engine.scheduler
        return scheduler.recording() if isinstance(scheduler, RecordingScheduler) else None

    def figures(self) -> dict[str, Any]:
        """Counters, gauges and histograms."""
        engine = self.engine
        limits = engine.scheduler.limits
        live = engine.live_timings()
        seated = [timings for timings in live if timings.first_planned is not None]
        metrics = engine.metrics
        totals = metrics.as_dict()
        totals["num_output_tokens"] += sum(len(timings.token_times) for timings in live)
        totals["num_prompt_tokens"] += sum(timings.num_prompt_tokens for timings in seated)
        totals["num_cached_tokens"] += sum(timings.num_cached_tokens for timings in seated)
        totals["num_preemptions"] += sum(timings.num_preemptions for timings in live)
        return {
            "totals": totals,
            "ended": dict(engine.figures.num_ended),
            "histograms": {name: histogram.as_dict() for name, histogram in engine.figures.histograms.items()},
            "limits": {
                "block_size": limits.block_size,
                "num_gpu_blocks": limits.num_kv_blocks - 1,
                "enable_prefix_caching": limits.enable_prefix_caching,
            },
        }

    def feed(self, since: int = -1) -> dict[str, Any]:
        """What the page shows: steps after `since`, requests, blocks."""
        timeline, scheduler = self.engine.timeline, self.engine.scheduler
        now = self.engine.clock()
        records = [record for record in timeline.last_steps(since) if record.applied is not None]
        live = list(islice(timeline.live.values(), MAX_REQUESTS))
        return {
            "now": now,
            "steps": [shown_step(record) for record in records[-MAX_STEPS:]],
            "requests": [shown_request(story, now) for story in live],
            "ended": [shown_end(story) for story in list(timeline.ended.values())[-MAX_ENDED:]],
            "num_running": scheduler.num_running,
            "num_waiting": scheduler.num_waiting,
            "blocks": self.block_cells(),
            "limits": {
                "max_num_batched_tokens": scheduler.limits.max_num_batched_tokens,
                "soft_cap": scheduler.limits.soft_cap,
                "max_num_seqs": scheduler.limits.max_num_seqs,
                "block_size": scheduler.limits.block_size,
            },
        }

    def block_cells(self) -> dict[str, Any]:
        """The map of the cache: a digit per cell, 0 free, 1 cached, 2 used, 3 shared; if a cell stands for several
        blocks, the state of most of them that are not free. And how many blocks are in each state."""
        states = self.engine.timeline.block_states()
        per_cell = -(-len(states) // MAX_CELLS)
        padded = np.zeros(-(-len(states) // per_cell) * per_cell, np.uint8)
        padded[: len(states)] = states
        cells = padded.reshape(-1, per_cell)
        counts = np.stack([(cells == state).sum(axis=1) for state in (1, 2, 3)])
        shown = np.where(counts.any(axis=0), counts.argmax(axis=0) + 1, 0)
        totals = np.bincount(states, minlength=4).tolist()
        names = ("free", "cached", "used", "shared")
        return {
            "cells": "".join(map(str, shown.tolist())),
            "per_cell": per_cell,
            "num": dict(zip(names, totals, strict=True)),
        }


def shown_step(record: StepRecord) -> dict[str, Any]:
    """A step as the page shows it."""
    plan = record.plan
    return {
        "step": plan.step,
        "started": record.started,
        "seconds": record.seconds,
        "device_seconds": record.device_seconds,
        "tokens": record.num_tokens,
        "num_decodes": record.num_decodes,
        "decodes": list(plan.requests[: min(record.num_decodes, MAX_DECODES)]),
        "chunks": [{"request": number, "start": start, "tokens": count} for number, start, count in record.chunks()],
        "waits": [{"request": w.request, "reason": w.reason, "behind": list(w.behind)} for w in plan.waits],
        "num_running": record.num_running,
        "num_waiting": record.num_waiting,
        "num_used": record.num_used,
        "num_shared": record.num_shared,
        "num_cached": record.num_cached,
    }


def shown_request(story: Story, now: float) -> dict[str, Any]:
    """A live request as the page shows it."""
    request, timings = story.request, story.timings
    assert request is not None
    return {
        "request": story.number,
        "state": state_of(story),
        "row": story.row,
        "seconds": now - timings.arrival,
        "num_prompt": request.num_prompt,
        "num_computed": min(request.num_computed, request.num_prompt),
        "num_output": request.num_output,
        "max_tokens": request.max_tokens,
        "num_blocks": len(request.blocks),
        "ttft": timings.ttft,
    }


def shown_end(story: Story) -> dict[str, Any]:
    """A request that ended, as the page shows it."""
    timings = story.timings
    return {
        "request": story.number,
        "finished": timings.finished,
        "ttft": timings.ttft,
        "e2el": timings.e2el,
        "num_prompt": timings.num_prompt_tokens,
        "num_cached": timings.num_cached_tokens,
        "num_output": len(timings.token_times),
    }
