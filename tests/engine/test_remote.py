"""The engine in a process of its own: what crosses the socket arrives as it was sent, and every end is noticed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from array import array
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minillm.errors
from minillm.config import EngineConfig
from minillm.engine.async_engine import AsyncEngine
from minillm.engine.messages import Ending, Load, Report, Submission
from minillm.engine.remote import ProcessLink
from minillm.engine.wire import Reader, pack_command, pack_report, unpack_command, unpack_report
from minillm.errors import ConfigError, EngineError, ModelNotFoundError
from minillm.types import FinishReason, SamplingParams, Timings, TokenScore

ROOT = Path(__file__).resolve().parents[2]
SMALL = EngineConfig(device="cpu", dtype="float32", max_model_len=256, num_kv_blocks=64)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=20)


def over_the_wire(packed: bytes, cut: int) -> Any:
    reader = Reader()
    (value,) = [*reader.feed(packed[:cut]), *reader.feed(packed[cut:])]
    return value


@given(IDS, st.text(max_size=9), st.binary(max_size=9), st.integers(0, 400))
def test_commands_arrive_as_they_were_sent(prompt: list[int], user: str, salt: bytes, cut: int) -> None:
    params = SamplingParams(max_tokens=7, temperature=0.25, seed=2**63 - 1, stop=["a", user or "b"], ignore_eos=True)
    sent = Submission(key=3, prompt=prompt, params=params, arrival=1.5, priority=-2, user=user, salt=salt)
    assert over_the_wire(pack_command(("submit", (sent,))), cut)[0] == "submit"
    assert unpack_command(over_the_wire(pack_command(("submit", (sent,))), cut)) == ("submit", (sent,))
    finish = ("finish", (3, FinishReason.STOP))
    assert unpack_command(over_the_wire(pack_command(finish), cut)) == finish
    ask = ("ask", (4, "dump", {"a": [1, None]}))
    assert unpack_command(over_the_wire(pack_command(ask), cut)) == ask


def test_every_default_of_the_parameters_survives() -> None:
    params = unpack_command(
        over_the_wire(
            pack_command(("submit", (Submission(key=1, prompt=[1], params=SamplingParams(), arrival=0.0),))), 5
        )
    )[1][0].params
    assert all(getattr(params, f.name) == getattr(SamplingParams(), f.name) for f in fields(SamplingParams))


@given(IDS, st.lists(st.floats(0, 1e9), max_size=5), st.integers(0, 400))
def test_reports_arrive_as_they_were_sent(tokens: list[int], times: list[float], cut: int) -> None:
    timings = Timings(arrival=1.0, first_planned=None, token_times=times, num_steps=4)
    report = Report(
        load=Load(1, 2, 3, 0.5, 6),
        keys=array("i", [1, 2]),
        counts=array("i", [len(tokens), 0]),
        tokens=array("i", tokens),
        endings=[Ending(1, FinishReason.LENGTH, timings, 9, "why")],
        scores=[(1, [TokenScore(5, -0.5, 2, ((7, -0.25), (5, -0.5)))]), (2, [])],
        prompt_scores=[(2, [None, TokenScore(5, -0.5, 1, ())])],
        answers=[(1, {"a": None})],
        failure="x",
    )
    assert unpack_report(over_the_wire(pack_report(report), cut)) == report


def test_an_engine_in_a_process_generates_and_ends() -> None:
    async def run() -> tuple[int, FinishReason]:
        engine = AsyncEngine(ProcessLink("random:tiny-llama", SMALL))
        await engine.open()
        (stream,) = engine.submit([1, 2, 3], SamplingParams(max_tokens=9, ignore_eos=True))
        num = 0
        while not stream.is_done:
            num += len(await stream.take())
        await engine.close()
        assert stream.ending is not None
        return num, stream.ending.reason

    assert asyncio.run(run()) == (9, FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("model", "config", "error"),
    [
        ("no-such-model", SMALL, ModelNotFoundError),
        ("random:tiny-llama", EngineConfig(device="cpu", max_model_len=10**7), ConfigError),
    ],
)
def test_what_starting_raises_is_raised_here(model: str, config: EngineConfig, error: type[Exception]) -> None:
    with pytest.raises(error, match="."):
        asyncio.run(AsyncEngine(ProcessLink(model, config)).open())


def test_the_end_of_the_process_ends_its_requests() -> None:
    async def run() -> None:
        link = ProcessLink("random:tiny-llama", SMALL)
        engine = AsyncEngine(link)
        await engine.open()
        (stream,) = engine.submit([1, 2, 3], SamplingParams(max_tokens=200, ignore_eos=True))
        question = asyncio.ensure_future(engine.ask("dump"))
        await stream.take()
        assert link._process is not None
        link._process.kill()
        while not stream.is_done:
            await stream.take()
        assert stream.ending is not None and stream.ending.reason is FinishReason.ERROR
        with suppress(EngineError):  # it may have been answered before
            await question
        assert not engine.is_healthy
        with pytest.raises(EngineError, match="process ended"):
            engine.submit([1], SamplingParams())
        await engine.close()

    asyncio.run(run())


def test_the_process_ends_with_its_front_end() -> None:
    """Also if that is killed: the child sees the socket close."""
    code = (
        "import asyncio, os\n"
        "from minillm.config import EngineConfig\n"
        "from minillm.engine.remote import ProcessLink\n"
        "link = ProcessLink('random:tiny-llama', EngineConfig(device='cpu', max_model_len=64, num_kv_blocks=9))\n"
        "asyncio.run(link.open(print))\n"
        "print(link._process.pid, flush=True)\n"
        "os._exit(1)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    # Both pipes close with the last process that holds them, so the child has ended when `run` returns.
    assert result.stdout.strip().isdigit(), result.stderr


def test_a_front_end_imports_no_torch() -> None:
    code = (
        "import sys, minillm.server.run\n"
        "from minillm.engine.front import load_front_tokenizer\n"
        "load_front_tokenizer('random:tiny-llama')\n"
        "print(sorted({'torch', 'triton', 'transformers', 'pickle5'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout == "[]\n"


def test_every_error_can_cross() -> None:
    kinds = [getattr(minillm.errors, name) for name in minillm.errors.__all__]
    started = [kind for kind in kinds if kind not in (minillm.errors.BusyError, minillm.errors.ClosingError)]
    assert [str(kind("text")) for kind in started] == ["text"] * len(started)
