"""What the server says of itself, and text to token ids and back."""

from __future__ import annotations

import pytest

from minillm import __version__
from tests.server.live import TINY, Live
from tests.server.test_limits import exchange


def test_health_readiness_version_models(live: Live) -> None:
    assert live.client.get("/health").json() == {"status": "ok"}
    assert live.client.get("/ready").json() == {"status": "ready"}
    assert live.client.get("/version").json() == {"version": __version__}
    (card,) = live.client.get("/v1/models").json()["data"]
    assert card["id"] == TINY and card["max_model_len"] == 256
    assert live.client.get(f"/v1/models/{TINY}").json() == card
    assert live.client.get("/v1/models/other").status_code == 404


def test_tokenize_and_back(live: Live) -> None:
    text = live.post("/detokenize", tokens=[5, 6, 500]).json()["prompt"]
    assert live.post("/tokenize", prompt=text).json() == {"count": 3, "max_model_len": 256, "tokens": [5, 6, 500]}
    chat = live.post("/tokenize", messages=[{"role": "user", "content": text}]).json()
    assert chat["tokens"] == [5, 6, 500]
    assert live.post("/detokenize", tokens=[512]).status_code == 400
    assert live.post("/tokenize", prompt="a", messages=[{"role": "user", "content": "a"}]).status_code == 400


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/v1/completions", 405)])
def test_unknown_paths_answer_like_openai(live: Live, method: str, path: str, status: int) -> None:
    response = live.client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/static/app.js",
        "/static/none",
        "/health",
        "/ready",
        "/version",
        "/metrics",
        "/v1/models",
        "/v1/completions",
    ],
)
def test_head_is_answered_as_get_without_a_body(live: Live, path: str) -> None:
    get, head = live.client.get(path), live.client.head(path)
    assert (head.status_code, head.headers["content-type"]) == (get.status_code, get.headers["content-type"])
    assert head.headers.keys() == get.headers.keys()
    sent = exchange(live, f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert sent.endswith(b"\r\n\r\n")
