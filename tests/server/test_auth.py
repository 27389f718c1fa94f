"""Keys: who gets in, on which paths, and where the server listens without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from minillm.errors import ConfigError
from minillm.server.auth import is_local_name, read_keys
from minillm.server.config import ServerConfig
from tests.server.live import Live, serving

KEYS = ("first-key-1", "second-key-2")
CLOSED = [
    "/v1/models",
    "/version",
    "/metrics",
    "/openapi.json",
    "/nothing",
    "//v1/models",
    "/health/",
    "/v1/%2E%2E/health",
]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(keys=KEYS) as server:
        yield server


def status(live: Live, path: str, key: str | None, method: str = "GET", **headers: str) -> int:
    given = headers | ({} if key is None else {"Authorization": key})
    live.client.headers.pop("Authorization", None)
    return live.client.request(method, path, headers=given).status_code


def test_either_key_opens(live: Live) -> None:
    assert [status(live, "/v1/models", f"Bearer {key}") for key in KEYS] == [200, 200]


@pytest.mark.parametrize("key", [None, "", "Bearer", "Bearer first-key-", "Basic first-key-1", "first-key-1"])
def test_anything_else_does_not(live: Live, key: str | None) -> None:
    assert status(live, "/v1/models", key) == 401


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize("host", ["127.0.0.1", "a/?x=", "a/health?", "/health"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_key_is_asked_for_whatever_the_path_and_host(live: Live, path: str, host: str, method: str) -> None:
    assert status(live, path, None, method, Host=host) == 401


@pytest.mark.parametrize("path", ["/", "/static/app.js", "/health", "/ready"])
def test_the_page_health_and_readiness_are_open_to_readers(live: Live, path: str) -> None:
    assert [status(live, path, None, method) for method in ("GET", "HEAD")] == [200, 200]
    live.client.headers.pop("Authorization", None)
    assert live.client.post("/health").status_code == 401


def test_an_answer_without_a_key_tells_nothing(live: Live) -> None:
    live.client.headers.pop("Authorization", None)
    response = live.client.get("/v1/models")
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["www-authenticate"] == "Bearer"
    assert not any(key in response.text for key in KEYS)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_other_machines_need_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="needs a key"):
        ServerConfig(host=host).check_exposed(has_key=False)
    ServerConfig(host=host).check_exposed(has_key=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_this_machine_needs_none(host: str) -> None:
    ServerConfig(host=host).check_exposed(has_key=False)


def test_without_a_key_only_local_names_are_answered() -> None:
    with serving() as live:
        hosts = [
            "127.0.0.1:1",
            "LocalHost",
            "[::1]:8000",
            "evil.example",
            "evil.example:8000",
            "localhost.evil.example",
        ]
        assert [status(live, "/v1/models", None, Host=host) for host in hosts] == [200, 200, 200, 403, 403, 403]
    assert not is_local_name("")


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(" first-key-1 \n\nsecond-key-2\n")
    assert read_keys(path, "third-key-3") == ["third-key-3", "first-key-1", "second-key-2"]
    assert read_keys(None, "third-key-3\n") == ["third-key-3"], "as it comes from a file"
    assert read_keys(None, None) == []


def test_a_key_of_other_letters_opens() -> None:
    key = "clé-secretà"  # its last byte would be a space in Latin-1
    with serving(keys=["first-key-1", key]) as live:
        live.client.headers.pop("Authorization", None)
        given = [(b"Authorization", b"Bearer " + part.encode()) for part in (key, key[:-1])]
        assert [live.client.get("/v1/models", headers=[each]).status_code for each in given] == [200, 401]


@pytest.mark.parametrize("text", [None, "", "\n \n", "short\n"])
def test_a_key_file_must_hold_a_key(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match="api_key_file|at least"):
        read_keys(path, None)
