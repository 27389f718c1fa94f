"""An engine's figures as Prometheus reads them, under this package's names and vLLM's. Labels have few values: the
model's name and why requests ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from minillm.engine.figures import DOCS

__all__ = ["CONTENT_TYPE", "metrics_text"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Plain(NamedTuple):
    """A figure without labels of its own: its name for users, the engine's, what it means."""

    name: str
    key: str
    meaning: str


GAUGES = (
    Plain("num_requests_running", "num_running", "Requests that have a row."),
    Plain("num_requests_waiting", "num_waiting", "Requests that wait for a row, in the engine or before it."),
    Plain("kv_cache_usage_perc", "kv_usage", "Share of the KV blocks that requests hold, 0 to 1."),
)
COUNTERS = (
    Plain("num_preemptions", "num_preemptions", "How often a request lost its KV blocks."),
    Plain("prompt_tokens", "num_prompt_tokens", "Prompt tokens of requests that were started."),
    Plain("generation_tokens", "num_output_tokens", "Output tokens, as usage counts them: none behind a stop string."),
    Plain("prefix_cache_queries", "num_prompt_tokens", "Prompt tokens that were looked up in the prefix cache."),
    Plain("prefix_cache_hits", "num_cached_tokens", "Prompt tokens that were found in it."),
)
OWN = (  # what vLLM has no name for
    Plain("steps", "num_steps", "Steps."),
    Plain("computed_tokens", "num_batched_tokens", "Tokens computed, of prompts and outputs."),
    Plain("device_seconds", "device_seconds", "Time that steps took on the device."),
    Plain("jit_compiles", "jit_compiles", "Kernels compiled."),
    Plain("graph_captures", "graph_captures", "CUDA graphs captured."),
)


class Figures:
    """A collector of one reading."""

    def __init__(self, figures: dict[str, Any], model_name: str, prefixes: Iterable[str]) -> None:
        self._figures, self._prefixes = figures, tuple(prefixes)
        self._labels = {"model_name": model_name, "engine": "0"}

    def collect(self) -> Iterator[Metric]:
        """Every figure, once for each prefix."""
        totals, labels = self._figures["totals"], self._labels
        for prefix in self._prefixes:
            for gauge in GAUGES:
                family = GaugeMetricFamily(f"{prefix}:{gauge.name}", gauge.meaning, labels=list(labels))
                family.add_metric(list(labels.values()), totals[gauge.key])
                yield family
            for counter in (*COUNTERS, *(OWN if prefix == self._prefixes[0] else ())):
                if counter.key in totals:
                    counted = CounterMetricFamily(f"{prefix}:{counter.name}", counter.meaning, labels=list(labels))
                    counted.add_metric(list(labels.values()), totals[counter.key])
                    yield counted
            yield self._ended(prefix)
            yield from (self._histogram(prefix, name) for name in self._figures["histograms"])
            yield self._cache_config(prefix)

    def _ended(self, prefix: str) -> Metric:
        names = [*self._labels, "finished_reason"]
        family = CounterMetricFamily(f"{prefix}:request_success", "Requests that ended, by the reason.", labels=names)
        for reason, num in self._figures["ended"].items():
            family.add_metric([*self._labels.values(), reason], num)
        return family

    def _histogram(self, prefix: str, name: str) -> Metric:
        values = self._figures["histograms"][name]
        family = HistogramMetricFamily(f"{prefix}:{name}", DOCS[name], labels=list(self._labels))
        buckets, total = [], 0
        for bound, count in zip([*values["bounds"], float("inf")], values["counts"], strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), total))
        family.add_metric(list(self._labels.values()), buckets, values["sum"])
        return family

    def _cache_config(self, prefix: str) -> Metric:
        limits = {name: str(value) for name, value in self._figures["limits"].items()}
        family = GaugeMetricFamily(
            f"{prefix}:cache_config_info", "The cache's sizes, as labels.", labels=["engine", *limits]
        )
        family.add_metric(["0", *limits.values()], 1)
        return family


def metrics_text(figures: dict[str, Any], model_name: str, *, with_vllm_names: bool) -> bytes:
    """What `Insight.figures` gave, in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Figures(figures, model_name, ("minillm", "vllm") if with_vllm_names else ("minillm",)))
    return generate_latest(registry)
