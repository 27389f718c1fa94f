"""An engine whose device computes hashes, for tests of what drives engines: no torch, microseconds a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minillm.core.plan import StepPlan, StepResult
from minillm.core.scheduler import Scheduler, SchedulerLimits
from minillm.engine.driver import EngineDriver
from minillm.engine.engine import Engine
from tests.core.fake_runner import EOS, VOCAB, FakeRunner

LIMITS: dict[str, Any] = {
    "max_num_batched_tokens": 16,
    "max_num_seqs": 2,
    "max_model_len": 64,
    "num_kv_blocks": 33,
    "block_size": 4,
    "min_chunk_size": 1,
}


class Pending:
    def __init__(self, run: Callable[[], StepResult]) -> None:
        self.wait = run


class FakeDevice:
    """Runs plans when their results are awaited; `before_step` may hang or raise."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._runner = FakeRunner(limits.num_kv_blocks, limits.block_size, limits.max_num_seqs)
        self.before_step: Callable[[], None] = lambda: None
        self.failing: Callable[[int], bool] = lambda request: False

    def submit(self, plan: StepPlan) -> Pending:
        def run() -> StepResult:
            self.before_step()
            return self._runner.run(plan, self.failing)

        return Pending(run)


def fake_engine(**limits: Any) -> tuple[Engine, FakeDevice]:
    """An engine and its device."""
    scheduler = Scheduler(SchedulerLimits(**(LIMITS | limits)))
    device = FakeDevice(scheduler.limits)
    return Engine(scheduler, device, vocab_size=VOCAB, eos_token_ids=[EOS]), device


def fake_driver(**limits: Any) -> tuple[EngineDriver, FakeDevice]:
    """A driver of such an engine."""
    engine, device = fake_engine(**limits)
    return EngineDriver(engine), device
