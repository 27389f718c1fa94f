"""Host time of `schedule` and `update`, with nothing behind them. It knows no model, tensors or device.

The mix: N rows decode at lengths that differ, so that some take a block in each step; a 2,048-token chunk of an
8,192-token prompt rides along; 64 such prompts wait, and each that is done takes the row of one that ends. Measured
is the scheduler by itself and as an engine has it, with a flight recorder. Times are those of the thread's own work
(the garbage collector's included), so other programs on the machine count for less.
"""

from __future__ import annotations

import json
import random
import time
from array import array
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from minillm.config import EngineConfig
from minillm.core.plan import RowParams, StepPlan, StepResult
from minillm.core.request import Request
from minillm.core.scheduler import SchedulerLimits
from minillm.engine.recorder import make_scheduler

__all__ = ["run"]

CHUNK_SIZE = 2048
PROMPT_LEN = 8192
NUM_WAITING = 64
BLOCK_SIZE = 16
NUM_WARM_UP_STEPS = 16
MEAN_LIMITS_MS = {256: 1.0, 1024: 3.0}
"""By number of rows: what a step may cost on average. Its 99th percentile may cost twice that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Milliseconds of thread time per step of one set-up; `add_ms` is per waiting prompt, its prefix keys included."""

    num_rows: int
    num_in_flight: int
    recorded_steps: int
    schedule_ms: float
    update_ms: float
    mean_ms: float
    p99_ms: float
    max_ms: float
    mean_limit_ms: float
    wall_mean_ms: float
    add_ms: float
    mean_step_tokens: float


class Mix:
    """A scheduler in the steady state of the mix."""

    def __init__(self, num_rows: int, num_in_flight: int, recorded_steps: int) -> None:
        self.random = random.Random(num_rows)
        self.num_rows = num_rows
        # One prompt is done every fourth step, so one request ends every fourth step.
        self.steps_per_prompt = PROMPT_LEN // CHUNK_SIZE
        max_len = PROMPT_LEN + self.steps_per_prompt * num_rows + 1
        limits = SchedulerLimits(
            max_num_batched_tokens=CHUNK_SIZE + num_rows,
            max_num_seqs=num_rows + 1,
            max_model_len=max_len,
            num_kv_blocks=(num_rows + 2) * -(-max_len // BLOCK_SIZE),
            block_size=BLOCK_SIZE,
            max_chunk_size=CHUNK_SIZE,
        )
        self.scheduler = make_scheduler(limits, recorded_steps)
        self.num_added = 0
        self.in_flight: list[StepPlan] = []
        self.num_in_flight = num_in_flight
        self.num_step_tokens = 0
        for i in range(num_rows):
            self.add(self.random.randrange(1, 256), self.steps_per_prompt * (i + 8))
        while self.scheduler.num_waiting:
            self.step()
        self.add_seconds = self.fill()
        for _ in range(NUM_WARM_UP_STEPS):
            self.step()

    def add(self, num_prompt: int, max_tokens: int) -> None:
        """Queue a request of random tokens."""
        self.num_added += 1
        prompt = array("i", self.random.choices(range(1, 50_000), k=num_prompt))
        params = RowParams(1.0, 0, 1.0, 0.0, self.num_added)
        stop_token_ids = frozenset({0})
        self.scheduler.add(
            Request(self.num_added, prompt, max_tokens=max_tokens, params=params, stop_token_ids=stop_token_ids)
        )

    def fill(self) -> float:
        """Let `NUM_WAITING` long prompts wait; returns the seconds that adding took."""
        seconds = 0.0
        while self.scheduler.num_waiting < NUM_WAITING:
            start = time.thread_time()
            self.add(PROMPT_LEN, self.steps_per_prompt * self.num_rows)
            seconds += time.thread_time() - start
        return seconds

    def step(self) -> tuple[float, float]:
        """Plan a step and apply the oldest result, with `num_in_flight` in flight; the seconds that each took."""
        start = time.thread_time()
        plan = self.scheduler.schedule(start)
        schedule_seconds = time.thread_time() - start
        assert plan is not None
        self.num_step_tokens = plan.num_batched_tokens
        self.in_flight.append(plan)
        if len(self.in_flight) < self.num_in_flight:
            return schedule_seconds, 0.0
        plan = self.in_flight.pop(0)
        result = StepResult(plan.step, plan.num_samples, array("i", [7]) * sum(plan.num_samples))
        start = time.thread_time()
        self.scheduler.update(plan, result)
        return schedule_seconds, time.thread_time() - start


def measure(num_rows: int, num_in_flight: int, recorded_steps: int, num_steps: int) -> Timing:
    """Time `num_steps` steps; the garbage collector runs as it likes, since it would when serving."""
    mix = Mix(num_rows, num_in_flight, recorded_steps)
    seconds: list[tuple[float, float]] = []
    num_tokens, wall_seconds = 0, 0.0
    for _ in range(num_steps):
        start = time.perf_counter()
        seconds.append(mix.step())
        wall_seconds += time.perf_counter() - start
        num_tokens += mix.num_step_tokens
        mix.fill()
    totals = sorted(1e3 * (schedule + update) for schedule, update in seconds)
    return Timing(
        num_rows=num_rows,
        num_in_flight=num_in_flight,
        recorded_steps=recorded_steps,
        schedule_ms=1e3 * sum(schedule for schedule, _ in seconds) / num_steps,
        update_ms=1e3 * sum(update for _, update in seconds) / num_steps,
        mean_ms=sum(totals) / num_steps,
        p99_ms=totals[int(0.99 * num_steps)],
        max_ms=totals[-1],
        mean_limit_ms=MEAN_LIMITS_MS[num_rows],
        wall_mean_ms=1e3 * wall_seconds / num_steps,
        add_ms=1e3 * mix.add_seconds / NUM_WAITING,
        mean_step_tokens=num_tokens / num_steps,
    )


def run(*, num_steps: int = 600) -> dict[str, Any]:
    """Measure 256 and 1,024 rows, one and two steps in flight, without and with a recorder of the engine's size.

    Prints a table and a JSON line, and returns it. The recorder begins anew once in the steps of the default.
    """
    each = product(MEAN_LIMITS_MS, (1, 2), (0, EngineConfig().recorded_steps))
    timings = [measure(*setup, num_steps) for setup in each]
    table = Table(
        "rows",
        "flying",
        "record",
        "plan",
        "update",
        "mean",
        "limit",
        "p99",
        "limit",
        "max",
        box=SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for t in timings:
        figures = (t.schedule_ms, t.update_ms, t.mean_ms, t.mean_limit_ms, t.p99_ms, 2 * t.mean_limit_ms, t.max_ms)
        counts = (str(t.num_rows), str(t.num_in_flight), str(t.recorded_steps))
        table.add_row(*counts, *(f"{figure:.2f}" for figure in figures))
    table.title = "milliseconds per step, of thread time"
    Console().print(table)
    is_within = all(t.mean_ms <= t.mean_limit_ms and t.p99_ms <= 2 * t.mean_limit_ms for t in timings)
    figures_by_name = {"bench": "scheduler", "is_within": is_within, "timings": [asdict(t) for t in timings]}
    print(json.dumps(figures_by_name))
    return figures_by_name


if __name__ == "__main__":
    run()
