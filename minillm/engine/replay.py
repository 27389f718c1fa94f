"""Runs a flight recording through the scheduler again and says where its plans differ. It needs no model and no device.

Blocks' keys come from the recording, as the tokens that they were made of are not in it.
"""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any, NamedTuple

from minillm.core.kv_manager import KVManager
from minillm.core.plan import StepPlan, StepResult
from minillm.core.request import Request
from minillm.core.scheduler import Scheduler
from minillm.engine.recorder import FORMAT, plan_columns
from minillm.engine.snapshot import decode, key_of
from minillm.errors import ConfigError
from minillm.types import FinishReason

__all__ = ["Replayed", "load", "replay"]

MAX_SHOWN = 200
WRONG = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, RecursionError)
"""What a damaged recording may raise."""


class Replayed(NamedTuple):
    """What a replay found: steps planned alike, and the first difference or None."""

    num_steps: int
    difference: str | None


class KnownKeys(KVManager):
    """A KVManager that looks keys up in place of computing them."""

    known: dict[int, list[bytes]]

    def extend_keys(self, request: Request, num_blocks: int) -> None:
        """Know the keys of the first `num_blocks` blocks."""
        request.keys[:] = self.known[request.number][:num_blocks]


def load(path: Path) -> dict[str, Any]:
    """A recording from its file. Raises ConfigError if it is none."""
    try:
        recording = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as a recording: {error}") from error
    if not isinstance(recording, dict) or recording.get("format") != FORMAT:
        raise ConfigError(f"{path} is no recording of this version of MiniLLM (its format would be {FORMAT})")
    return recording


def replay(recording: dict[str, Any]) -> Replayed:
    """Ask a scheduler the same again, and compare each plan with the recorded one, up to the first difference.

    Raises ConfigError if the recording is damaged.
    """
    if recording.get("state") is None:
        return Replayed(0, None)
    objects: dict[int, Any] = {}
    try:
        scheduler = decode(recording["state"], objects, {"KVManager": KnownKeys})
        scheduler.kv.known = {int(n): [key_of(key) for key in keys] for n, keys in recording["keys"].items()}
        plans = {columns["step"]: plan_of(columns) for columns in recording["in_flight"]}
        events = [(str(event[0]), *event[1:]) for event in recording["events"]]
    except WRONG as error:
        raise ConfigError(f"the recording is damaged: {error!r}") from error
    num_steps = 0
    for at, (kind, *values) in enumerate(events):
        try:
            difference = run_event(scheduler, plans, kind, values)
        except WRONG as error:
            difference = f"the scheduler failed: {error!r}"
        if difference is not None:
            return Replayed(num_steps, f"event {at} ({kind}), after {num_steps} steps: {difference}")
        num_steps += kind == "schedule" and values[0] is not None
    return Replayed(num_steps, None)


def run_event(scheduler: Scheduler, plans: dict[int, StepPlan], kind: str, values: list[Any]) -> str | None:
    """One call of the scheduler; a difference from what is recorded, or None."""
    if kind == "add":
        scheduler.add(decode(values[0], {}, {}))
    elif kind == "fork":
        scheduler.fork(scheduler._live[values[0]], decode(values[1], {}, {}))
    elif kind == "adopt":
        scheduler.adopt(*(scheduler._live[number] for number in values))
    elif kind == "choose":
        scheduler.choose(scheduler._live[values[0]], None if values[1] else 0)
    elif kind == "yield":
        scheduler.yield_rows()
    elif kind == "finish":
        scheduler.finish(values[0], FinishReason(values[1][1]))
    elif kind == "schedule":
        if values[0] is not None:
            add_drafts(scheduler, values[0])
        plan = scheduler.schedule(0.0)
        if plan is not None:
            plans[plan.step] = plan
        return find_difference(values[0], None if plan is None else plan_columns(plan))
    elif kind == "update":
        step, counts, tokens, failed = values
        result = StepResult(step, array("i", counts), array("i", tokens), array("i", failed))
        scheduler.update(plans.pop(step), result)
    else:
        raise ConfigError(f"a recording holds an event {kind[:40]!r}, which MiniLLM does not write")
    return None


def add_drafts(scheduler: Scheduler, recorded: dict[str, Any]) -> None:
    """Give each request as many drafts as were planned for it; those that found no room changed nothing."""
    for number, count, num_samples in zip(
        recorded["requests"], recorded["counts"], recorded["num_samples"], strict=True
    ):
        if num_samples == count > 1 and number in scheduler._live:
            scheduler._live[number].drafts = [0] * (count - 1)


def find_difference(recorded: dict[str, Any] | None, replayed: dict[str, Any] | None) -> str | None:
    """How two plans differ, in words; None if they are alike."""
    if recorded is None or replayed is None:
        if recorded is replayed:
            return None
        return f"recorded {'no plan' if recorded is None else 'a plan'}, now {'none' if replayed is None else 'one'}"
    for name in replayed:
        old, new = recorded.get(name), replayed[name]
        if old != new:
            return f"step {replayed['step']}: {name} was {str(old)[:MAX_SHOWN]}, now {str(new)[:MAX_SHOWN]}"
    return None


def plan_of(columns: dict[str, Any]) -> StepPlan:
    """What `update` needs of a recorded plan."""
    plan = StepPlan(columns["step"])
    for name in ("requests", "starts", "counts"):
        setattr(plan, name, array("i", columns[name]))
    return plan
