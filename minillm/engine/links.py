"""How a front end reaches its engine: ThreadLink runs it in a thread of the same process. It knows no requests."""

from __future__ import annotations

import asyncio
import logging
import queue
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from minillm.engine.driver import Command, EngineDriver, drive
from minillm.engine.info import EngineInfo
from minillm.engine.messages import Load, Report

__all__ = ["Link", "ThreadLink"]

LOG = logging.getLogger(__name__)
JOIN_SECONDS = 10.0


class Link(Protocol):
    """A way to an engine."""

    async def open(self, deliver: Callable[[Report], None]) -> EngineInfo:
        """Start the engine; from then on reports come to `deliver` on this event loop. Raises what starting raises."""

    def send(self, command: Command) -> None:
        """Hand over a command; never waits."""

    async def dump(self) -> str:
        """Where the engine is and what it has, for a person to read, also if it is stuck."""

    async def close(self) -> None:
        """End the engine; its last report has come when this returns."""


class ThreadLink:
    """An engine in a thread. It is made there too, so that all its work is one thread's."""

    def __init__(self, start: Callable[[], EngineDriver]) -> None:
        self._start = start
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._reports: deque[Report] = deque()
        self._driver: EngineDriver | None = None
        self._is_over = False
        self._thread: threading.Thread | None = None

    async def open(self, deliver: Callable[[Report], None]) -> EngineInfo:
        """Start the engine. Raises what starting raises."""
        self._loop, self._deliver = asyncio.get_running_loop(), deliver
        started: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="engine", daemon=True)
        self._thread.start()
        return await started

    def send(self, command: Command) -> None:
        """Hand over a command."""
        self._commands.put(command)

    async def dump(self) -> str:
        """The driver's state and the thread's stack; the state is read while the thread runs."""
        assert self._thread is not None and self._driver is not None
        try:
            state = str(self._driver.dump())
        except RuntimeError as error:  # something changed while it was read
            state = f"state not readable: {error}"
        frame = sys._current_frames().get(self._thread.ident or 0)
        return state + "\n" + "".join(traceback.format_stack(frame))

    async def close(self) -> None:
        """End the engine; one that is stuck is left behind."""
        self._commands.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, JOIN_SECONDS)
            if self._thread.is_alive():
                LOG.error("the engine did not end within %g s and is left behind", JOIN_SECONDS)
            self._flush()

    def _run(self, started: asyncio.Future[EngineInfo]) -> None:
        try:
            self._driver = driver = self._start()
        except BaseException as error:
            self._loop.call_soon_threadsafe(started.set_exception, error)
            return
        self._loop.call_soon_threadsafe(started.set_result, driver.engine.info)
        try:
            drive(driver, self._take, self._post)
        except Exception as error:
            traceback.print_exc()
            self._post(Report(load=Load(), failure=f"the engine's thread ended: {error}"))

    def _take(self, may_wait: bool) -> Sequence[Command] | None:
        """All commands that have come, at least one if it may wait; None after the last."""
        commands: list[Command] = []
        with suppress(queue.Empty):
            while not self._is_over:
                command = self._commands.get(block=may_wait and not commands)
                if command is None:
                    self._is_over = True
                else:
                    commands.append(command)
        return None if self._is_over and not commands else commands

    def _post(self, report: Report) -> None:
        """Append a report; the loop is woken only if it has none yet, so that one that lags takes several at once."""
        self._reports.append(report)
        if len(self._reports) == 1:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        while self._reports:
            report = self._reports[0]
            self._deliver(report)
            self._reports.popleft()
