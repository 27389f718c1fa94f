"""ServerConfig: where the server listens and what it takes on, each with a safe default. It knows no engine."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass
from pathlib import Path

from minillm.errors import ConfigError
from minillm.types import as_float, as_int, shown

__all__ = ["ServerConfig", "is_loopback"]

RANGES = {  # of the integers; the rest of the numbers are seconds
    "port": (0, 65535),
    "max_body_bytes": (1024, 2**31),
    "max_header_bytes": (1024, 2**24),
    "max_waiting": (1, 2**20),
    "max_per_user": (1, 2**20),
    "max_prompts": (1, 2**16),
    "max_n": (1, 2**16),
    "max_choices": (1, 2**16),
}
MAX_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How to serve."""

    host: str = "127.0.0.1"
    """Address to listen on; another than this machine's own needs a key."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key_file: Path | None = None
    """File with the key that clients must send, one a line if several; or put the key into MINILLM_API_KEY."""
    served_model_name: str | None = None
    """Name of the model in the API; None takes the one that it was loaded by."""
    engine_process: bool = True
    """Run the engine in a process of its own, so that what clients ask never waits for a step nor a step for them."""
    vllm_metrics: bool = True
    """Give the metrics under vLLM's names too, for dashboards made for it."""
    otlp_endpoint: str | None = None
    """Send a span for each request to this OpenTelemetry endpoint (OTLP over HTTP, as http://localhost:4318/v1/traces)."""
    max_body_bytes: int = 4 * 2**20
    """Largest body of a request."""
    max_header_bytes: int = 32 * 2**10
    """Most bytes before the body of a request."""
    receive_seconds: float = 30.0
    """Time in which a request's head, and then its body, must have come, and more of an answer be read."""
    max_waiting: int = 1024
    """Most completions that wait for their first token; more are refused with 429 and the time to come back."""
    max_per_user: int = 512
    """Most unfinished completions of one `user`."""
    max_prompts: int = 128
    """Most prompts in one request."""
    max_n: int = 128
    """Most completions of one prompt."""
    max_choices: int = 256
    """Most completions of one request, prompts times n."""
    request_seconds: float = 3600.0
    """A request ends unfinished after this time; clients may ask for less (`timeout`)."""
    drain_seconds: float = 60.0
    """Time that requests have to end after SIGTERM or Ctrl-C; a second one aborts them at once."""
    stall_seconds: float = 120.0
    """Without a finished step for this long while there is work, /health turns 503 and the log says where it hangs."""

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = as_int(getattr(self, name))
            if value is None or not low <= value <= high:
                raise ConfigError(f"{name} must be an integer from {low} to {high}, not {shown(getattr(self, name))}")
        for name in ("receive_seconds", "request_seconds", "drain_seconds", "stall_seconds"):
            seconds = as_float(getattr(self, name))
            if math.isnan(seconds) or not 0 < seconds <= MAX_SECONDS:
                raise ConfigError(f"{name} must be a number of seconds above 0 and at most {MAX_SECONDS:.0f}")

    def check_exposed(self, has_key: bool) -> None:
        """Raise ConfigError if others could reach the server without a key."""
        if not has_key and not is_loopback(self.host):
            raise ConfigError(
                f"host {self.host} can be reached by other machines, which needs a key: name a file with it "
                "(api_key_file) or put it into MINILLM_API_KEY; or listen on 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address. A name other than localhost may lead anywhere.

    >>> is_loopback("127.0.0.1"), is_loopback("0.0.0.0")
    (True, False)
    """
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
