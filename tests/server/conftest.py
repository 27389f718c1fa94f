"""A server of the tiny random model, shared by the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.live import Live, serving


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving() as server:
        yield server
