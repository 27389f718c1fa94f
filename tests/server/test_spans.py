"""OpenTelemetry's span of a request: its times, sizes and end, and nothing that it says."""

from __future__ import annotations

import sys
import time

import pytest

from minillm.errors import ConfigError
from minillm.server.spans import Spans, open_spans
from tests.server.live import TINY, Live

pytest.importorskip("opentelemetry.sdk", reason="needs OpenTelemetry")


def test_a_request_is_a_span(live: Live) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans = Spans(provider, TINY)
    live.engine.on_end = spans.note_end
    before = time.time_ns()
    answer = live.post("/v1/completions", prompt=[123] * 30, max_tokens=6, ignore_eos=True).json()
    live.wait_idle()
    (span,) = exporter.get_finished_spans()
    values = dict(span.attributes or {})
    assert span.name == "llm_request"
    assert (values["gen_ai.usage.prompt_tokens"], values["gen_ai.usage.completion_tokens"]) == (30, 6)
    assert values["gen_ai.response.finish_reason"] == "length" and values["gen_ai.response.model"] == TINY
    timings = answer["timings"]
    assert values["gen_ai.latency.time_in_queue"] == pytest.approx(timings["queue_seconds"], abs=1e-5)
    assert values["gen_ai.latency.time_to_first_token"] == pytest.approx(timings["ttft_seconds"], abs=1e-5)
    assert values["gen_ai.latency.e2e"] == pytest.approx(timings["total_seconds"], abs=1e-5)
    assert span.start_time is not None and span.end_time is not None
    assert before <= span.start_time < span.end_time <= time.time_ns()
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(timings["total_seconds"], abs=0.02)
    assert not any(isinstance(value, list | tuple) for value in values.values()), "tokens are what a request says"
    assert "123 123" not in str(values.values()) and "123, 123" not in str(values.values())
    spans.close()


def test_without_the_packages_the_option_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"otlp_endpoint needs more packages .*minillm\[otel\]"):
        open_spans("http://localhost:4318/v1/traces", TINY)
