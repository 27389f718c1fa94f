"""The timeline's steps as a trace for Perfetto or chrome://tracing (the Trace Event Format). Ids, never contents."""

from __future__ import annotations

from typing import Any

from minillm.engine.timeline import StepRecord, Timeline

__all__ = ["trace"]

STEPS, ROWS = 1, 2


def trace(timeline: Timeline) -> dict[str, Any]:
    """The steps on record: one track of steps, one of each row, and counters; times in microseconds.

    A row's decode steps in succession are one slice. A step still under way is left out.
    """
    records = [record for record in timeline.last_steps() if record.applied is not None]
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": STEPS, "tid": 0, "args": {"name": "steps"}},
        {"ph": "M", "name": "process_name", "pid": ROWS, "tid": 0, "args": {"name": "rows"}},
    ]
    for record in records:
        events.append(step_event(record))
        events.extend(counters(record, timeline.num_blocks))
    return {"traceEvents": events + row_events(records), "displayTimeUnit": "ms"}


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


def row_events(records: list[StepRecord]) -> list[dict[str, Any]]:
    """What each row did: a slice per chunk, one per run of decode steps."""
    events: list[dict[str, Any]] = []
    runs: dict[int, dict[str, Any]] = {}  # by row: the decode slice that may grow
    for record in records:
        plan, start, dur = record.plan, 1e6 * record.started, 1e6 * record.seconds
        seen: dict[int, dict[str, Any]] = {}
        for i, (number, row, count) in enumerate(zip(plan.requests, plan.rows, plan.counts, strict=True)):
            run = runs.get(row)
            is_decode = i < record.num_decodes
            if is_decode and run is not None and run["args"]["request"] == number:
                run["dur"] = start + dur - run["ts"]
                run["args"]["steps"] += 1
            else:
                name = f"{'decode' if is_decode else count} · request {number}"
                run = {"ph": "X", "name": name, "pid": ROWS, "tid": row, "ts": start, "dur": dur}
                run["args"] = {"request": number, "steps": 1}
                events.append(run)
            if is_decode:
                seen[row] = run
        runs = seen
    return events
