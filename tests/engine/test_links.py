"""The engine in a thread, as its event loop sees it: it starts, fails to start, hangs and ends."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from minillm.engine import links
from minillm.engine.async_engine import AsyncEngine
from minillm.engine.driver import EngineDriver
from minillm.engine.links import ThreadLink
from minillm.errors import ConfigError, EngineError
from minillm.types import FinishReason, SamplingParams
from tests.engine.fakes import fake_driver

PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)


def test_what_starting_raises_is_raised() -> None:
    def start() -> EngineDriver:
        raise ConfigError("too large")

    with pytest.raises(ConfigError, match="too large"):
        asyncio.run(AsyncEngine(ThreadLink(start)).open())


def test_closing_ends_every_request() -> None:
    async def run() -> FinishReason | None:
        engine = AsyncEngine(ThreadLink(lambda: fake_driver()[0]))
        await engine.open()
        streams = [engine.submit([1, 2, 3], PARAMS)[0] for _ in range(20)]
        await engine.close()
        assert all(stream.ending is not None for stream in streams)
        with pytest.raises(EngineError):
            engine.submit([1], PARAMS)
        return streams[-1].ending and streams[-1].ending.reason

    assert asyncio.run(run()) is FinishReason.ABORT


def test_nothing_is_left_of_a_request_that_could_not_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        link = ThreadLink(lambda: fake_driver()[0])
        engine = AsyncEngine(link)
        await engine.open()

        def fail(command: Any) -> None:
            raise ValueError("not to be packed")

        with monkeypatch.context() as patch, pytest.raises(ValueError, match="packed"):
            patch.setattr(link, "send", fail)
            engine.submit([1, 2, 3], PARAMS, user="a", timeout=9.0)
        assert engine.num_unfinished == 0 and engine.num_of_user == {}
        (stream,) = engine.submit([1, 2, 3], PARAMS)
        while not stream.is_done:
            await stream.take()
        await engine.close()

    asyncio.run(run())


def test_an_engine_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(links, "JOIN_SECONDS", 0.05)
    driver, device = fake_driver()
    hung, goes_on = threading.Event(), threading.Event()

    def hang() -> None:
        hung.set()
        assert goes_on.wait(60)

    async def run() -> None:
        device.before_step = hang
        engine = AsyncEngine(ThreadLink(lambda: driver))
        await engine.open()
        (stream,) = engine.submit([1, 2, 3], PARAMS)
        await asyncio.to_thread(hung.wait, 60)
        await engine.close()
        assert stream.ending is not None and stream.ending.reason is FinishReason.ERROR
        assert "left behind" in caplog.text
        goes_on.set()

    asyncio.run(run())
