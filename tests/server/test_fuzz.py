"""Requests made from the server's own schema, and from real ones with parts replaced: none breaks it, its engine or a
neighbour. `make test` sends 500, `make soak` 10,000."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.core import NotSet

from minillm.server.app import create_app
from tests.server.live import SECONDS, Live, serving, threaded

NEIGHBOUR: dict[str, Any] = {"prompt": [5, 6, 7], "temperature": 0, "max_tokens": 20, "ignore_eos": True}
POSTS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize")
FEW, MANY = 500, 10_000
SHARED = {
    "deadline": None,
    "database": None,
    "phases": (Phase.generate,),  # a failure shows its request as it is
    "suppress_health_check": list(HealthCheck),
}
MESSAGES = [{"role": "user", "content": "baba bebe"}]
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "baba", "max_tokens": 4}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "n": 2, "max_tokens": 3, "echo": True, "stop": ["ba"]}),
    ("/v1/completions", {"prompt": [7], "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4, "temperature": 0.5, "seed": 1, "user": "a"}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4, "stream": True, "top_p": 0.9, "top_k": 5}),
    ("/v1/responses", {"input": "baba", "max_output_tokens": 4, "instructions": "bebe"}),
    ("/v1/responses", {"input": MESSAGES, "max_output_tokens": 4, "stream": True}),
    ("/tokenize", {"prompt": "baba"}),
    ("/tokenize", {"messages": MESSAGES}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=20)
    | st.sampled_from([0, 1, -1, 2**31, 2**63 - 1, 10**300, "", "\x00", "\ud800", "a" * 10_000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something could be replaced."""
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_in(item, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with `new` at `path`."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@st.composite
def changed_requests(draw: st.DrawFn) -> tuple[str, Any]:
    """A path and a real body in which some parts are something else."""
    path, body = draw(st.sampled_from(BODIES))
    changed: Any = body
    for _ in range(draw(st.integers(1, 3))):
        changed = replaced(changed, draw(st.sampled_from(list(paths_in(changed)))), draw(JSON))
    return path, changed


def schema_requests(live: Live) -> st.SearchStrategy[tuple[str, Any]]:
    """Paths and bodies as the server's OpenAPI schema allows them."""
    schema = schemathesis.openapi.from_dict(create_app(live.service).openapi())
    cases = [schema[path]["POST"].as_strategy() for path in POSTS]
    with_body = st.one_of(cases).filter(lambda case: not isinstance(case.body, NotSet))
    return with_body.map(lambda case: (case.path, case.body))


class Neighbour:
    """A client that asks the same again and again, and wants the same answer."""

    def __init__(self, live: Live) -> None:
        self._live, self._is_over = live, False
        self.expected = self._ask()
        self.answers: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run)

    def _ask(self) -> str:
        response = self._live.post("/v1/completions", **NEIGHBOUR)
        return str(response.json()["choices"][0]["text"]) if response.status_code == 200 else response.text

    def _run(self) -> None:
        while not self._is_over:
            self.answers[self._ask()] += 1

    @contextmanager
    def asking(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._is_over = True
            self._thread.join(SECONDS)
        assert set(self.answers) == {self.expected}


def send(live: Live, path: str, body: Any, statuses: Counter[int]) -> None:
    """Send one request; only what a client can be told may come back."""
    content = json.dumps(body).encode()
    response = live.client.post(path, content=content, headers={"Content-Type": "application/json"})
    statuses[response.status_code] += 1
    assert response.status_code in (200, 400, 404, 408, 413, 429), (path, body, response.status_code, response.text)
    assert not re.search("0x[0-9a-f]{8}", response.text), "an address; less may be an echo of what was sent"
    assert "Traceback" not in response.text and "/site-packages" not in response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        lines = [line for line in response.text.split("\n") if line.startswith("data: ") and "[DONE]" not in line]
        assert json.loads(lines[-1].removeprefix("data: ")).get("type") != "error"


def fuzz(num: int) -> Counter[int]:
    """Send `num` requests, half of each kind, beside a neighbour."""
    statuses: Counter[int] = Counter()
    with serving(config=threaded(max_prompts=8, max_n=4, max_choices=16)) as live:

        def run(requests: st.SearchStrategy[tuple[str, Any]]) -> Callable[[], None]:
            @settings(max_examples=num // 2, **SHARED)
            @given(requests)
            def send_all(request: tuple[str, Any]) -> None:
                send(live, *request, statuses)

            return send_all

        with Neighbour(live).asking():
            run(changed_requests())()
            run(schema_requests(live))()
        assert live.client.get("/health").status_code == 200
        live.wait_idle()
    return statuses


def test_500_requests() -> None:
    statuses = fuzz(FEW)
    assert sum(statuses.values()) >= FEW * 0.9
    assert statuses[200] > FEW / 20 and statuses[400] > FEW / 20, statuses


@pytest.mark.soak
def test_10_000_requests() -> None:
    statuses = fuzz(MANY)
    print(f"\nfuzz: {dict(sorted(statuses.items()))}")
    assert sum(statuses.values()) >= MANY * 0.9
