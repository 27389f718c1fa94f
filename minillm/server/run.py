"""`serve`: engine, application and socket from start to end. SIGTERM or Ctrl-C drains, a second one aborts."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from minillm.config import EngineConfig
from minillm.engine.async_engine import AsyncEngine, AsyncLimits
from minillm.engine.collector import keep_what_is_there
from minillm.engine.driver import EngineDriver
from minillm.engine.front import load_front_tokenizer
from minillm.engine.links import Link, ThreadLink
from minillm.engine.remote import ProcessLink
from minillm.errors import ConfigError
from minillm.server.app import create_app
from minillm.server.config import ServerConfig
from minillm.server.http import bounded_protocol
from minillm.server.service import Service
from minillm.server.spans import open_spans

__all__ = ["ApiServer", "open_service", "serve"]

LOG = logging.getLogger(__name__)
LAST_SECONDS = 1.0
"""For the last bytes of answers to go out."""


def serve(model: str, engine: EngineConfig, config: ServerConfig, keys: Sequence[str]) -> None:
    """Serve a model until a signal ends it. Raises what loading the model raises; ConfigError."""
    config.check_exposed(bool(keys))
    with asyncio.Runner(loop_factory=fastest_loop()) as runner:
        runner.run(run(model, engine, config, keys))


def fastest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes an event loop: uvloop's, where it is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def run(model: str, engine: EngineConfig, config: ServerConfig, keys: Sequence[str]) -> None:
    """The same on this event loop."""
    listener = listen(config.host, config.port)
    service = await open_service(model, engine, config)
    server = ApiServer(service, keys)
    keep_what_is_there()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.leave)
    host, port = listener.getsockname()[:2]
    LOG.warning("%s is served on http://%s:%d", service.model_name, f"[{host}]" if ":" in host else host, port)
    spans = open_spans(config.otlp_endpoint, service.model_name) if config.otlp_endpoint else None
    if spans is not None:
        service.engine.on_end = spans.note_end
    try:
        await server.serve(sockets=[listener])
    finally:
        await service.engine.close()
        if spans is not None:
            await asyncio.to_thread(spans.close)


async def open_service(model: str, engine: EngineConfig, config: ServerConfig) -> Service:
    """Start a model's engine. Raises ModelNotFoundError, CheckpointError, DownloadError, ConfigError."""
    tokenizer = await asyncio.to_thread(load_front_tokenizer, model)
    limits = AsyncLimits(
        max_waiting=config.max_waiting, max_per_user=config.max_per_user, stall_seconds=config.stall_seconds
    )
    async_engine = AsyncEngine(link_to(model, engine, config), limits)
    await async_engine.open()
    return Service(async_engine, tokenizer, config.served_model_name or model, config)


def link_to(model: str, engine: EngineConfig, config: ServerConfig) -> Link:
    """The way to an engine that is still to be started."""
    if config.engine_process:
        return ProcessLink(model, engine)

    def start() -> EngineDriver:
        from minillm.engine.launch import launch_driver

        return launch_driver(model, engine)

    return ThreadLink(start)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"host {host} and port {port} cannot be listened on: {error}") from error


class ApiServer(uvicorn.Server):
    """uvicorn with this package's limits, and an end that lets requests finish."""

    def __init__(self, service: Service, keys: Sequence[str]) -> None:
        config = service.config
        super().__init__(
            uvicorn.Config(
                create_app(service, keys),
                http=bounded_protocol(config.max_header_bytes, config.receive_seconds),
                ws="none",
                lifespan="off",
                proxy_headers=False,
                server_header=False,
                access_log=False,
                log_level="warning",
            )
        )
        self._engine, self._drain_seconds = service.engine, config.drain_seconds
        self._drain: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `run`."""
        yield

    def leave(self) -> None:
        """End when requests have; the second time, now."""
        if self._drain is None:
            LOG.warning("ending: %d requests have %g s to finish", self._engine.num_unfinished, self._drain_seconds)
            self._drain = asyncio.get_running_loop().create_task(self._leave())
        else:
            self._engine.abort_all()
            self.should_exit = self.force_exit = True
            asyncio.get_running_loop().call_later(LAST_SECONDS, self._cut)

    async def _leave(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._drain_seconds
        await self._engine.drain(self._drain_seconds)
        self.should_exit = True
        loop.call_at(max(end, loop.time() + LAST_SECONDS), self._cut)

    def _cut(self) -> None:
        """End the connections of those who still send, or have not read what they were sent."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()
