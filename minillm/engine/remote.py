"""An engine in a process of its own. `python -m minillm.engine.remote` is that process: it reads what to start as JSON
from its standard input and speaks MessagePack over the Unix socket that it inherited. ProcessLink is the way to it.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import logging
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import minillm.errors
from minillm.config import EngineConfig
from minillm.engine.collector import keep_what_is_there
from minillm.engine.driver import Command, drive
from minillm.engine.info import EngineInfo
from minillm.engine.messages import Load, Report
from minillm.engine.wire import Reader, pack_command, pack_report, pack_value, unpack_command, unpack_report
from minillm.errors import EngineError

__all__ = ["ProcessLink"]

LOG = logging.getLogger(__name__)
READ_BYTES = 2**18
CLOSE = "close"
CLOSE_SECONDS = 5.0
DUMP_SIGNAL = signal.SIGUSR1


class ProcessLink:
    """An engine in a child process, which ends when this end of the socket is closed, however that comes."""

    def __init__(self, model: str, config: EngineConfig) -> None:
        self._start = {"model": model, "config": asdict(config)}
        self._process: subprocess.Popen[bytes] | None = None

    async def open(self, deliver: Callable[[Report], None]) -> EngineInfo:
        """Start the process. Raises what starting the engine raised there."""
        self._deliver, self._is_closing = deliver, False
        ours, theirs = socket.socketpair()
        options = ["-O"] if sys.flags.optimize else []
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, *options, "-m", "minillm.engine.remote"],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
            )
            assert self._process.stdin is not None
            with self._process.stdin as stdin:
                stdin.write(json.dumps(self._start | {"socket": theirs.fileno()}).encode())
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        values = self._values()
        first = await anext(values, None)
        if first is None or "error" in first:
            await self.close()
            name, message = (first or {}).get("error", ("EngineError", "the engine's process ended as it started"))
            kind = getattr(minillm.errors, name) if name in minillm.errors.__all__ else EngineError
            raise kind(message)
        self._reading = asyncio.create_task(self._read(values))
        return EngineInfo.from_dict(first["info"])

    def send(self, command: Command) -> None:
        """Hand over a command."""
        self._writer.write(pack_command(command))

    async def dump(self) -> str:
        """Has the process write its stack to the standard error that both share: it may not be able to answer."""
        assert self._process is not None
        self._process.send_signal(DUMP_SIGNAL)
        return f"the stack of process {self._process.pid} follows on standard error"

    async def close(self) -> None:
        """End the process; one that does not end by itself is killed."""
        self._is_closing = True
        if self._process is None:
            return
        self._writer.write(pack_value([CLOSE, []]))
        try:
            await asyncio.to_thread(self._process.wait, CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        if hasattr(self, "_reading"):
            await self._reading
        self._writer.close()

    async def _values(self) -> Any:
        reader = Reader()
        try:
            while data := await self._reader.read(READ_BYTES):
                for value in reader.feed(data):
                    yield value
        except ConnectionError:
            return

    async def _read(self, values: Any) -> None:
        """Deliver reports until the process has ended."""
        async for value in values:
            self._deliver(unpack_report(value))
        if not self._is_closing:
            self._deliver(Report(load=Load(), failure="the engine's process ended"))


class Channel:
    """The engine's end of the socket. What a slow reader leaves waits here, so that no step waits for a reader."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._reader = connection, Reader()
        self._out = bytearray()
        self._commands: list[Command] = []
        self._is_open = True
        connection.setblocking(False)

    def take(self, may_wait: bool) -> Sequence[Command] | None:
        """All commands that have come, at least one if it may wait; None after the last."""
        self._exchange()
        while may_wait and self._is_open and not self._commands:
            select.select([self._socket], [self._socket] if self._out else [], [])
            self._exchange()
        commands, self._commands = self._commands, []
        return commands if commands or self._is_open else None

    def deliver(self, report: Report) -> None:
        """Send a report."""
        self.put(pack_report(report))

    def put(self, data: bytes) -> None:
        """Send bytes, as many as the socket takes now and the rest later."""
        self._out += data
        self._write()

    def flush(self) -> None:
        """Send all that waits."""
        while self._out:
            select.select([], [self._socket], [])
            self._write()

    def _write(self) -> None:
        try:
            while self._out:
                del self._out[: self._socket.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:  # nobody reads any more
            self._out.clear()
            self._is_open = False

    def _exchange(self) -> None:
        self._write()
        try:
            while self._is_open:
                data = self._socket.recv(READ_BYTES)
                for name, given in self._reader.feed(data):
                    if name == CLOSE:
                        self._is_open = False
                    else:
                        self._commands.append(unpack_command((name, given)))
                self._is_open = self._is_open and bool(data)
        except BlockingIOError:
            pass
        except ConnectionError:
            self._is_open = False


def main() -> None:
    """The engine's process, from what standard input says until the socket closes."""
    faulthandler.register(DUMP_SIGNAL, all_threads=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they are the front end's, which says when to end
    start = json.load(sys.stdin)
    channel = Channel(socket.socket(fileno=start["socket"]))
    try:
        from minillm.engine.launch import launch_driver

        driver = launch_driver(start["model"], EngineConfig(**start["config"]))
    except Exception as error:
        if type(error).__name__ not in minillm.errors.__all__:
            traceback.print_exc()
        channel.put(pack_value({"error": [type(error).__name__, str(error)]}))
        channel.flush()
        return
    keep_what_is_there()
    channel.put(pack_value({"info": driver.engine.info.as_dict()}))
    drive(driver, channel.take, channel.deliver)
    channel.flush()


if __name__ == "__main__":
    main()
