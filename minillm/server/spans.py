"""A span for each request, for OpenTelemetry, under vLLM's attribute names. Off unless an endpoint is given; ids, sizes
and times, never contents."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from minillm.engine.async_engine import TokenStream
from minillm.errors import ConfigError

__all__ = ["Spans", "open_spans"]


class Spans:
    """Makes spans of ended requests. `provider` is OpenTelemetry's TracerProvider."""

    def __init__(self, provider: Any, model_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._provider, self._model_name, self._clock = provider, model_name, clock
        self._tracer = provider.get_tracer("minillm")

    def note_end(self, stream: TokenStream) -> None:
        """A request ended: its span is from its arrival to its end."""
        ending, params = stream.ending, stream.submission.params
        assert ending is not None and ending.timings.finished is not None
        timings, finished = ending.timings, ending.timings.finished
        first = timings.token_times[0] if timings.token_times else None
        attributes = {
            "gen_ai.response.model": self._model_name,
            "gen_ai.request.id": str(ending.number),
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.prompt_tokens": timings.num_prompt_tokens,
            "gen_ai.usage.completion_tokens": len(timings.token_times),
            "gen_ai.usage.cached_tokens": timings.num_cached_tokens,
            "gen_ai.response.finish_reason": ending.reason.value,
            "gen_ai.latency.e2e": finished - timings.arrival,
            "gen_ai.latency.time_in_queue": seconds(timings.arrival, timings.first_planned),
            "gen_ai.latency.time_to_first_token": seconds(timings.arrival, first),
            "gen_ai.latency.time_in_model_prefill": seconds(timings.first_planned, first),
            "gen_ai.latency.time_in_model_decode": seconds(first, finished),
        }
        known = {name: value for name, value in attributes.items() if value is not None}
        span = self._tracer.start_span("llm_request", start_time=self._wall(timings.arrival), attributes=known)
        span.end(end_time=self._wall(finished))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _wall(self, moment: float) -> int:
        """Nanoseconds since the epoch of a moment on the monotonic clock."""
        return time.time_ns() - round(1e9 * (self._clock() - moment))


def seconds(start: float | None, end: float | None) -> float | None:
    """Time between two moments, None if one never came."""
    return None if start is None or end is None else end - start


def open_spans(endpoint: str, model_name: str) -> Spans:
    """Spans that go to an OTLP/HTTP endpoint in the background. Raises ConfigError without OpenTelemetry."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(f"otlp_endpoint needs more packages ({error.name}): pip install 'minillm[otel]'") from error
    provider = TracerProvider(resource=Resource.create({"service.name": "minillm"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Spans(provider, model_name)
