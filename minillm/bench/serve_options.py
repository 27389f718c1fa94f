"""The options of `minillm bench serve`. It knows no HTTP, so that the command line can read them without it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minillm.bench.lengths import TRACES
from minillm.errors import ConfigError

__all__ = ["FIRST_TOKEN_ID", "ServeOptions", "check_above_zero", "check_url"]

FIRST_TOKEN_ID = 5
"""Below it are the special tokens of most models."""


def check_above_zero(options: object, names: Sequence[str]) -> None:
    """Raise ConfigError unless these fields are above 0; infinity is."""
    for name in names:
        if not getattr(options, name) > 0:
            raise ConfigError(f"{name} must be above 0, not {getattr(options, name)}")


def check_url(base_url: str) -> None:
    """Raise ConfigError unless this can lead to a server."""
    if not base_url.startswith(("http://", "https://")):
        raise ConfigError(f"base_url must begin with http:// or https://, not {base_url[:40]!r}")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What to send to which server, and what to report."""

    base_url: str = "http://127.0.0.1:8000"
    """The server, without /v1."""
    model: str | None = None
    """Name of the model; None takes the first that the server lists."""
    endpoint: str = "completions"
    """completions sends random token ids, chat sends random words (about a token each)."""
    num_prompts: int = 100
    """Requests."""
    request_rate: float = math.inf
    """Requests per second on average; inf sends all at once."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of the times between requests: 1 is Poisson, less comes in bursts."""
    max_concurrency: int | None = None
    """Most requests under way."""
    input_len: str = "1024"
    """Tokens of a prompt: 1024 is fixed, 100:1024 uniform."""
    output_len: str = "128"
    """Tokens to ask for, likewise."""
    trace: str | None = None
    """sharegpt or arxiv: lengths of both as in these traces, instead."""
    vocab_size: int = 10_000
    """Token ids are below this."""
    ignore_eos: bool = True
    """Ask for all tokens; only servers that know the field accept it."""
    num_clients: int = 1
    """Processes that send: one reads some 10,000 tokens a second."""
    num_warmups: int = 1
    """Requests before those that count."""
    percentiles: str = "50,90,99"
    """Percentiles to report."""
    goodput: str = ""
    """Goals in milliseconds, such as ttft:500,tpot:20,e2el:5000: goodput counts requests that meet all."""
    seed: int = 0
    """Draws lengths, tokens and times."""
    timeout: float = 600.0
    """Seconds after which a request has failed."""
    plot: Path | None = None
    """Picture of the distributions, .png or .svg; needs matplotlib."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "vocab_size", "max_concurrency", "num_clients"):
            value = getattr(self, name)
            if value is not None and value < (FIRST_TOKEN_ID + 1 if name == "vocab_size" else 1):
                raise ConfigError(f"{name} must be at least {FIRST_TOKEN_ID + 1 if name == 'vocab_size' else 1}")
        check_above_zero(self, ("request_rate", "burstiness", "timeout"))
        if self.endpoint not in ("completions", "chat"):
            raise ConfigError(f"endpoint must be completions or chat, not {self.endpoint!r}")
        if self.trace is not None and self.trace not in TRACES:
            raise ConfigError(f"trace must be one of {', '.join(TRACES)}, not {self.trace!r}")
        check_url(self.base_url)

    def shares(self) -> list[float]:
        """The percentiles as numbers. Raises ConfigError."""
        try:
            shares = [float(part) for part in self.percentiles.split(",")]
        except ValueError:
            shares = [math.nan]
        if not all(0 <= share <= 100 for share in shares):
            raise ConfigError(f"percentiles must be numbers from 0 to 100, as 50,90,99, not {self.percentiles[:40]!r}")
        return shares
