"""The options of `minillm bench gap`. It knows no HTTP, so that the command line can read them without it."""

from __future__ import annotations

from dataclasses import dataclass

from minillm.bench.serve_options import FIRST_TOKEN_ID, check_above_zero, check_url
from minillm.errors import ConfigError

__all__ = ["GapOptions"]

LEAST = {
    "num_streams": 1,
    "num_clients": 1,
    "input_len": 1,
    "output_len": 2,
    "long_len": 1,
    "vocab_size": FIRST_TOKEN_ID + 1,
}


@dataclass(frozen=True, kw_only=True)
class GapOptions:
    """What streams run on which server when a long prompt arrives."""

    base_url: str = "http://127.0.0.1:8000"
    """The server, without /v1."""
    model: str | None = None
    """Name of the model; None takes the first that the server lists."""
    num_streams: int = 64
    """Requests that decode when the long prompt arrives."""
    num_clients: int = 4
    """Processes that read the streams."""
    input_len: int = 1024
    """Tokens of their prompts."""
    output_len: int = 8192
    """Most tokens that each asks for: more than come in the time; the rest is given up."""
    long_len: int = 32_768
    """Tokens of the long prompt."""
    seconds: float = 10.0
    """How long all streams decode before it arrives, at least: each goes on until two more tokens came."""
    vocab_size: int = 10_000
    """Token ids are below this."""
    seed: int = 0
    """Draws the tokens."""
    timeout: float = 600.0
    """Seconds after which a request has failed."""

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        check_above_zero(self, ("seconds", "timeout"))
        check_url(self.base_url)
