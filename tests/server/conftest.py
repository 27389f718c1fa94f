"""A server of the tiny random model, shared by the tests of a file: its engine in a thread, then in a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from minillm.server.config import ServerConfig
from tests.server.live import Live, serving


@pytest.fixture(scope="module", params=[False, True], ids=["thread", "process"])
def live(request: pytest.FixtureRequest) -> Iterator[Live]:
    with serving(config=ServerConfig(port=0, engine_process=request.param)) as server:
        yield server
