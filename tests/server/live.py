"""A server over a real socket in a thread of the test's process, and what tests ask of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx

from minillm.config import EngineConfig
from minillm.server.config import ServerConfig
from minillm.server.run import ApiServer, listen, open_service

Answer = TypeVar("Answer")
TINY = "random:tiny-llama"
SMALL = EngineConfig(device="cpu", dtype="float32", max_model_len=256, num_kv_blocks=128, max_num_seqs=8)
SECONDS = 60.0


def threaded(**options: Any) -> ServerConfig:
    """A server on a free port whose engine is a thread of the test's process, for the test to look into."""
    return ServerConfig(port=0, engine_process=False, **options)


class Live:
    """A running server."""

    def __init__(self, model: str, engine: EngineConfig, config: ServerConfig, keys: Sequence[str]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        listener = listen(config.host, config.port)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.service = self.run(open_service(model, engine, config))
        self.engine = self.service.engine
        self.server = ApiServer(self.service, keys)
        self._serving = asyncio.run_coroutine_threadsafe(self.server.serve(sockets=[listener]), self._loop)
        headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=SECONDS)

    def run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """The result of a coroutine on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(SECONDS)

    def call(self, function: Callable[[], Answer]) -> Answer:
        """The result of a function on the server's event loop."""

        async def work() -> Answer:
            return function()

        return self.run(work())

    def post(self, path: str, **body: Any) -> httpx.Response:
        """POST a JSON body."""
        return self.client.post(path, json=body)

    def dump(self) -> dict[str, Any]:
        """The engine's state between two steps."""
        state: dict[str, Any] = self.run(self.engine.ask("dump"))
        return state

    def num_aborted(self) -> int:
        """Requests that reached the engine and were aborted, so far."""
        return int(self.run(self.engine.ask("figures"))["ended"]["abort"])

    def wait_idle(self) -> None:
        """Return when no request is left and no step is in flight; fail if blocks are still in use."""
        self.run(asyncio.wait_for(self._idle(), SECONDS))

    async def _idle(self) -> None:
        while True:
            state = await self.engine.ask("dump")
            if not (state["requests"] or state["num_in_fair_queue"] or self.engine.num_unfinished):
                assert state["num_free_blocks"] == state["num_blocks"] - 1, state
                return

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Return when the server's side is as wanted; it is looked at on the event loop."""

        async def wait() -> None:
            while not is_so():
                await self.engine.ask("dump")

        self.run(wait())

    def close(self) -> None:
        """End the server and its thread."""
        self.client.close()

        async def end() -> None:
            self.server.should_exit = True
            self.engine.abort_all()
            await asyncio.wrap_future(self._serving)
            await self.engine.close()

        self.run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SECONDS)
        self._loop.close()


@contextmanager
def serving(
    model: str = TINY, engine: EngineConfig = SMALL, config: ServerConfig | None = None, keys: Sequence[str] = ()
) -> Iterator[Live]:
    """A server on a free port."""
    live = Live(model, engine, config or threaded(), keys)
    try:
        yield live
    finally:
        live.close()
