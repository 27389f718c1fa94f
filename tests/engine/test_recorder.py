"""The flight recorder: what it keeps replays to the same plans, differences are found, and no content is in it."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from types import NoneType
from typing import Any

import pytest
from typer.testing import CliRunner

from minillm import LLM
from minillm.cli import app
from minillm.core.plan import StepPlan
from minillm.core.scheduler import Scheduler
from minillm.engine.recorder import RecordingScheduler
from minillm.engine.replay import load, replay
from minillm.engine.snapshot import REQUEST_FIELDS, Keys, decode, encode, freeze
from minillm.errors import ConfigError
from minillm.types import FinishReason, SamplingParams
from tests.core.builders import limits_of, request_of, step
from tests.core.world import World
from tests.engine.clockwork import add, engine_of, run

NUM_WORLDS = 60


class RecordedWorld(World):
    """A world whose scheduler records; nobody but the scheduler takes blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.hold_rate = 0.0
        self.scheduler: RecordingScheduler = RecordingScheduler(self.limits, random.Random(self.seed).choice((3, 20)))


def recording_of(scheduler: RecordingScheduler) -> dict[str, Any]:
    """Its record, as it comes from a file."""
    recording: dict[str, Any] = json.loads("".join(scheduler.recording()))
    return recording


def recorded(num_steps: int = 1000, **limits: Any) -> dict[str, Any]:
    """A recording of a small mix with preemptions, chunks and prefix hits, as it comes from a file."""
    values = {"max_num_batched_tokens": 40, "num_kv_blocks": 24, "block_size": 4, "max_num_seqs": 4} | limits
    scheduler = RecordingScheduler(limits_of(**values), num_steps)
    engine = engine_of(overlap=True, scheduler=scheduler)
    for number in range(8):
        engine.add([5] * 20 + [number] * (7 * number), SamplingParams(max_tokens=12, ignore_eos=True))
    run(engine)
    assert scheduler.num_preemptions
    return recording_of(scheduler)


def test_random_worlds_replay_alike() -> None:
    counts: Counter[str] = Counter()
    for seed in range(NUM_WORLDS):
        world = RecordedWorld(seed).run()
        counts += world.counts
        found = replay(recording_of(world.scheduler))
        assert found.difference is None, f"seed {seed}: {found.difference}"
        counts["steps"] += found.num_steps
        counts["drafts"] += any(e[0] == "update" and max(e[2]) > 1 for e in recording_of(world.scheduler)["events"])
    assert counts["steps"] > 8 * NUM_WORLDS
    wanted = ("preemption", "prefix hit", "fork shared", "fork copied", "drafts", "abort decoding", "abort in flight")
    assert all(counts[what] for what in wanted), counts


def test_only_the_last_steps_are_kept_and_replay_from_the_middle() -> None:
    full, short = recorded(), recorded(num_steps=10)
    found = replay(short)
    assert found.difference is None and 10 <= found.num_steps <= 20 < replay(full).num_steps
    assert short["state"] != full["state"]


@pytest.mark.parametrize("num_steps", [10, 1000])
def test_a_planted_difference_is_found(num_steps: int) -> None:
    recording = recorded(num_steps)
    plans = [event[1] for event in recording["events"] if event[0] == "schedule" and event[1]]
    plans[5]["counts"][0] += 1
    found = replay(recording)
    assert found.num_steps == 5
    assert found.difference is not None and f"step {plans[5]['step']}: counts was" in found.difference


def test_another_schedule_is_found() -> None:
    """The same requests under another limit: as if the scheduler had changed since."""
    recording = recorded()
    limits = find_object(recording["state"], "SchedulerLimits")
    limits["max_num_batched_tokens"] = 20
    found = replay(recording)
    assert found.difference is not None and "was" in found.difference


def find_object(value: Any, name: str) -> dict[str, Any]:
    """The fields of the first object of a class in an encoded value."""
    if isinstance(value, list) and value[:2] == ["object", name]:
        return dict_of(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for part in parts if (found := find_object(part, name))), {})


def dict_of(value: list[Any]) -> dict[str, Any]:
    fields: dict[str, Any] = value[3]
    return fields


def test_no_content_is_in_a_recording() -> None:
    scheduler = RecordingScheduler(limits_of(), 8)
    engine = engine_of(scheduler=scheduler)
    for number in range(6):
        params = SamplingParams(max_tokens=9, temperature=0.123, stop_token_ids=[8765], seed=987654)
        engine.add([7654 + number] * 40, params, salt=b"secret")
        engine.step()
    text = "".join(scheduler.recording())
    assert not [content for content in ("7654", "7659", "8765", "0.123", "987654", "secret") if content in text]
    assert json.loads(text)["keys"]


def test_a_state_thaws_to_one_that_plans_alike() -> None:
    scheduler = Scheduler(limits_of(max_num_batched_tokens=24, num_kv_blocks=30, block_size=4))
    for number in range(1, 7):
        scheduler.add(request_of(number, 9 * number, max_tokens=30))
    for _ in range(8):
        step(scheduler)
    thawed = decode(json.loads(json.dumps(encode(freeze(scheduler), Keys()))), {}, {})
    thawed.check_invariants()
    for _ in range(5):
        plans: list[StepPlan] = [step(scheduler), step(thawed)]
        assert plans[0].counts == plans[1].counts and plans[0].blocks == plans[1].blocks


def test_freezing_takes_copies() -> None:
    scheduler = Scheduler(limits_of())
    scheduler.add(request_of(1, 40))
    step(scheduler)
    frozen = freeze(scheduler)
    before = encode(frozen, Keys())
    for _ in range(3):
        step(scheduler)
    assert encode(frozen, Keys()) == before


def test_a_recording_is_of_the_moment_it_was_asked_for() -> None:
    """And comes in pieces that do not take long, whatever happens between them."""
    scheduler = RecordingScheduler(limits_of(max_num_batched_tokens=24, num_kv_blocks=30, block_size=4), 3)
    for number in range(1, 7):
        scheduler.add(request_of(number, 9 * number, max_tokens=30))
    for _ in range(8):
        step(scheduler)
    expected, written = "".join(scheduler.recording()), []
    for piece in scheduler.recording():
        written.append(piece)
        if scheduler.has_work:
            step(scheduler)
    assert len(written) > 50 and "".join(written) == expected


def test_what_freezing_does_not_copy_cannot_change_in_place() -> None:
    """A new field of requests that holds a list would be shared with the record: `freeze_request` must copy it."""
    scheduler = Scheduler(limits_of())
    for number in (1, 2):
        scheduler.add(request_of(number, 40 * number))
    step(scheduler)
    for request in scheduler._live.values():
        for name in set(REQUEST_FIELDS) - {"blocks", "keys", "parent"}:
            value = getattr(request, name)
            assert isinstance(value, (int, float, str, tuple, FinishReason, NoneType)), name


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "minillm-recording-0"}', "[" * 100_000, "\x00", '{"format": NaN}'],
)
def test_what_is_no_recording_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recording.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="recording"):
        load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "missing.json")


def test_damage_is_an_error_or_a_difference_and_nothing_else() -> None:
    """Anything in a recording may be anything: no damage makes `replay` fail otherwise, hang or run code."""
    rng = random.Random(0)
    text = json.dumps(recorded(num_steps=10))
    outcomes: Counter[str] = Counter()
    for _ in range(150):
        recording = json.loads(text)
        damage(recording, rng)
        try:
            outcomes["alike" if replay(recording).difference is None else "different"] += 1
        except ConfigError:
            outcomes["refused"] += 1
    assert outcomes["different"] and outcomes["refused"]


def damage(value: Any, rng: random.Random) -> None:
    """Replace one thing somewhere inside."""
    while True:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        inner = value[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
            value = inner
            continue
        value[key] = rng.choice((None, -1, 0, 10**12, "x", [], {}, ["object", "os", 1, {}], ["same", 10**6], 0.5))
        return


def test_an_engine_without_requests_has_an_empty_recording() -> None:
    assert replay(recording_of(RecordingScheduler(limits_of(), 4))) == (0, None)


def test_aborts_are_recorded() -> None:
    scheduler = RecordingScheduler(limits_of(max_num_seqs=2), 100)
    engine = engine_of(overlap=True, scheduler=scheduler)
    generations = [add(engine, 30, 9) for _ in range(5)]
    for generation in generations[::2]:
        engine.step()
        engine.finish(generation, FinishReason.ABORT)
    run(engine)
    recording = recording_of(scheduler)
    assert [event[0] for event in recording["events"]].count("finish") >= 3
    assert replay(recording).difference is None


def test_the_command_says_whether_the_schedule_is_the_same(tmp_path: Path) -> None:
    path, recording = tmp_path / "recording.json", recorded()
    path.write_text(json.dumps(recording))
    result = CliRunner().invoke(app, ["replay", str(path)])
    assert result.exit_code == 0 and "steps were planned as they were recorded" in result.output
    next(event[1] for event in recording["events"] if event[0] == "schedule" and event[1])["freed"] = [3]
    path.write_text(json.dumps(recording))
    result = CliRunner().invoke(app, ["replay", str(path)])
    assert result.exit_code == 1 and "freed was [3], now []" in result.output


@pytest.mark.parametrize("recorded_steps", [4, 500])
@pytest.mark.parametrize("options", [{}, {"speculative": "ngram"}, {"overlap": False, "num_kv_blocks": 14}])
def test_real_engines_replay_alike(options: dict[str, Any], recorded_steps: int) -> None:
    """Drafts, several completions of a prompt, end tokens, preemptions."""
    values = {
        "device": "cpu",
        "dtype": "float32",
        "num_kv_blocks": 64,
        "max_model_len": 256,
        "max_num_seqs": 6,
    } | options
    with LLM("random:tiny-llama", recorded_steps=recorded_steps, **values) as llm:
        llm.generate([[5, 6, 7, 8] * 10, [6] * 30, [5, 6, 7, 8] * 6], SamplingParams(max_tokens=40, n=2, seed=1))
        scheduler = llm.engine.scheduler
        assert isinstance(scheduler, RecordingScheduler)
        found = replay(recording_of(scheduler))
        assert found.difference is None
        assert found.num_steps >= min(recorded_steps, llm.engine.metrics.num_steps)


def test_an_llm_records_unless_told_otherwise() -> None:
    with LLM("random:tiny-llama", device="cpu", num_kv_blocks=64, max_model_len=256) as llm:
        llm.generate([[5] * 40, [6] * 30], SamplingParams(max_tokens=5, ignore_eos=True))
        scheduler = llm.engine.scheduler
        assert isinstance(scheduler, RecordingScheduler)
        found = replay(recording_of(scheduler))
        assert found.difference is None and found.num_steps == llm.engine.metrics.num_steps
    with LLM("random:tiny-llama", device="cpu", num_kv_blocks=64, recorded_steps=0) as llm:
        assert type(llm.engine.scheduler) is Scheduler
