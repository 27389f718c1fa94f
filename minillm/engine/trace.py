"""The timeline's steps as a trace for Perfetto or chrome://tracing (the Trace Event Format). Ids, never contents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from minillm.engine.timeline import StepRecord, Timeline

__all__ = ["trace"]

STEPS, ROWS = 1, 2


def trace(timeline: Timeline) -> Iterator[str]:
    """The steps on record as JSON text: one track of steps, one of each row, and counters; times in microseconds.

    A row's decode steps in succession are one slice. A step still under way is left out. The text is written piece by
    piece as the pieces are taken; meanwhile the engine may go on.
    """
    return texts([record for record in timeline.last_steps() if record.applied is not None], timeline.num_blocks)


def texts(records: Sequence[StepRecord], num_blocks: int) -> Iterator[str]:
    """The events of a few rows or of one step at a time."""
    names = ((STEPS, "steps"), (ROWS, "rows"))
    events = [{"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}} for pid, name in names]
    yield '{"displayTimeUnit": "ms", "traceEvents": ' + json.dumps(events)[:-1]
    for record in records:
        yield "".join(f", {json.dumps(event)}" for event in (step_event(record), *counters(record, num_blocks)))
    for events in row_events(records):
        yield "".join(f", {json.dumps(event)}" for event in events)
    yield "]}"


def step_event(record: StepRecord) -> dict[str, Any]:
    """A step as a slice."""
    plan, chunks = record.plan, record.chunks()
    return {
        "ph": "X",
        "name": f"{record.num_decodes} decodes" + "".join(f" + {count}" for _, _, count in chunks),
        "pid": STEPS,
        "tid": 0,
        "ts": 1e6 * record.started,
        "dur": 1e6 * record.seconds,
        "args": {
            "step": plan.step,
            "tokens": record.num_tokens,
            "chunks": [{"request": number, "start": start, "tokens": count} for number, start, count in chunks],
            "waits": [{"request": w.request, "reason": w.reason, "behind": list(w.behind)} for w in plan.waits],
            "device_ms": 1e3 * record.device_seconds,
            "planned_ahead_ms": 1e3 * (record.started - record.planned),
        },
    }


def counters(record: StepRecord, num_blocks: int) -> list[dict[str, Any]]:
    """Figures at a step's start, as counter tracks."""
    values = {
        "requests": {"running": record.num_running, "waiting": record.num_waiting},
        "KV blocks": {
            "used": record.num_used,
            "cached": record.num_cached,
            "free": num_blocks - record.num_used - record.num_cached,
        },
        "step tokens": {
            "decodes": record.num_tokens - sum(count for _, _, count in record.chunks()),
            "chunks": sum(count for _, _, count in record.chunks()),
        },
    }
    at = 1e6 * record.started
    return [{"ph": "C", "name": name, "pid": STEPS, "ts": at, "args": args} for name, args in values.items()]


def row_events(records: Sequence[StepRecord]) -> Iterator[list[dict[str, Any]]]:
    """What each row did: a slice per chunk and one per run of decode steps; by steps, chunks and runs that ended."""
    runs: dict[int, dict[str, Any]] = {}  # by row: the decode slice that may grow
    for record in records:
        plan, start, dur = record.plan, 1e6 * record.started, 1e6 * record.seconds
        ended, runs, chunks = runs, {}, []
        for i, (number, row, count) in enumerate(zip(plan.requests, plan.rows, plan.counts, strict=True)):
            is_decode = i < record.num_decodes
            run = ended.get(row)
            if is_decode and run is not None and run["args"]["request"] == number:
                run["dur"] = start + dur - run["ts"]
                run["args"]["steps"] += 1
                runs[row] = ended.pop(row)
                continue
            name = f"{'decode' if is_decode else count} · request {number}"
            run = {"ph": "X", "name": name, "pid": ROWS, "tid": row, "ts": start, "dur": dur}
            run["args"] = {"request": number, "steps": 1}
            if is_decode:
                runs[row] = run
            else:
                chunks.append(run)
        yield [*ended.values(), *chunks]
    yield list(runs.values())
