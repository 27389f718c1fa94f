"""What the server says of itself, and text to token ids and back."""

from __future__ import annotations

import pytest

from minillm import __version__
from tests.server.live import TINY, Live


def test_health_readiness_version_models(live: Live) -> None:
    assert live.client.get("/health").json() == {"status": "ok"}
    assert live.client.get("/ready").json() == {"status": "ready"}
    assert live.client.head("/health").status_code == 200
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
