"""The open-loop benchmark: arrivals are those of its description, times count from them, nothing holds them back."""

from __future__ import annotations

import gc
import json
import math
import random
import statistics
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from minillm import LLM
from minillm.bench import load
from minillm.bench.load import Arrival, Served, Spread
from minillm.config import EngineConfig
from minillm.errors import ConfigError, EngineError

SMALL = (Spread(12, 30, 2, 60), Spread(6, 12, 1, 20))
CONFIG = EngineConfig(device="cpu", dtype="float32", enable_prefix_caching=False, num_kv_blocks=64, max_num_seqs=8)


class Clock:
    """A clock that goes on by a millisecond when it is read, and by as long as somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 100.0, 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        self.now += seconds


def test_arrivals_are_drawn_in_the_order_of_the_peers() -> None:
    """One stream for gaps and lengths by turns, another for token ids: any engine gets the same at one seed."""
    rng, ids = random.Random(7), random.Random(8)
    at, expected = 0.0, []
    while at < 5:
        at += rng.expovariate(3)
        prompt, output = (
            math.exp(rng.gauss(math.log(p50), math.log(p90 / p50) / 1.2816)) for p50, p90 in ((1730, 5696), (415, 834))
        )
        num_prompt, num_output = int(min(max(prompt, 16), 8000)), int(min(max(output, 8), 1500))
        expected.append(Arrival(at, [ids.randint(0, 10000) for _ in range(num_prompt)], num_output))
    assert load.draw_arrivals(3, 5, 7, vocab_size=128_256) == expected
    assert expected[-1].at >= 5 > expected[-2].at


def test_arrivals_have_the_rate_and_the_quantiles_that_they_name() -> None:
    arrivals = load.draw_arrivals(
        4.0, 1000.0, 0, vocab_size=50, spreads=(Spread(50, 100, 1, 200), Spread(9, 20, 2, 30))
    )
    assert 3800 < len(arrivals) < 4200
    prompts, outputs = [len(a.prompt) for a in arrivals], [a.num_output for a in arrivals]
    assert 47 < statistics.median(prompts) < 53 and 93 < statistics.quantiles(prompts, n=10)[-1] < 107
    assert (min(outputs), max(outputs)) == (2, 30)
    assert {token for a in arrivals for token in a.prompt} == set(range(50))


def test_figures_by_hand() -> None:
    served = [Served(10, 1.0, [1.5, 1.6, 1.9]), Served(20, 2.0, [2.1, 2.15]), Served(5, 3.0, [4.0])]
    assert load.figures(served) == {
        "requests": 3,
        "seconds": 4.0,
        "output_tok_s": 1.5,
        "total_tok_s": 10.2,
        "ttft_p50_s": 0.5,
        "ttft_p90_s": 1.0,
        "itl_p50_ms": 100.0,
        "itl_p90_ms": 300.0,
        "itl_p99_ms": 300.0,
        "itl_max_ms": 300.0,
    }
    assert load.figures([Served(1, 0.0, [2.0])])["itl_max_ms"] == 0.0


def test_nobody_holds_an_arrival_back() -> None:
    """Requests come while others run, the loop sleeps when none is there, and times count from the arrival."""
    arrivals = [Arrival(0.0, [5] * 30, 12), Arrival(0.006, [6] * 9, 5), Arrival(40.0, [7] * 3, 4)]
    with LLM("random:tiny-llama", device="cpu", dtype="float32", num_kv_blocks=64, max_num_batched_tokens=16) as llm:
        clock = Clock()
        llm.engine.clock = clock
        served = load.drive(llm.engine, arrivals, clock.sleep)
    assert [each.arrival for each in served] == [0.0, 0.006, 40.0]
    first, second, third = (each.token_times for each in served)
    assert [len(first), len(second), len(third)] == [12, 5, 4]
    assert second[0] < first[-1], "served beside the first"
    assert 39 < clock.slept < 40
    assert 40 < third[0] < 40.1


def test_the_collector_is_spared_while_requests_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk of the whole heap would be the longest gap."""
    counts, before = list[int](), gc.get_freeze_count()

    def serve(engine: Any, arrivals: Any) -> list[Served]:
        counts.append(gc.get_freeze_count())
        return []

    monkeypatch.setattr(load, "drive", serve)
    own = load.OwnLoad("random:tiny-llama", CONFIG)
    own.serve([])
    own.close()
    assert counts[0] > 0 and gc.get_freeze_count() == before


def test_a_lost_token_is_an_error() -> None:
    with pytest.raises(EngineError, match="request 1 got 2 tokens, 3 were asked for"):
        load.complete([[0.1], [0.1, 0.2]], [Arrival(0.0, [1], 1), Arrival(0.0, [1], 3)])


def test_a_run_prints_a_row_for_each_rate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "WARM_UP", (50.0, 0.01, 99))
    line = load.run(model="random:tiny-llama", rates=[40, 80], seconds=0.1, config=CONFIG, spreads=SMALL)
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == line
    assert sum("minillm 512" in text for text in printed) == 2
    assert [(row["engine"], row["qps"]) for row in line["results"]] == [("minillm", 40), ("minillm", 80)]
    for row, rate in zip(line["results"], (40, 80), strict=True):
        assert row["requests"] == len(load.draw_arrivals(rate, 0.1, 0, 512, SMALL))
        assert row["budget"] == 512 and row["jit_compiles"] == 0
        assert 0 < row["itl_p50_ms"] <= row["itl_p99_ms"] <= row["itl_max_ms"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"engines": ["made-up"]}, "no engine 'made-up'; there are minillm, vllm"),
        ({"rates": [0.0]}, "qps must be above 0, not 0.0"),
        ({"seconds": math.inf}, "seconds must be above 0, not inf"),
        ({"vllm_budgets": [0]}, "vllm_budget must be at least 1, not 0"),
        ({"engines": ["vllm"]}, "pip install vllm"),
    ],
)
def test_what_cannot_be_run_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load.run(model="random:tiny-llama", config=CONFIG, spreads=SMALL, **options)


class StandIn:
    """As much of vLLM's AsyncLLM as the benchmark drives."""

    asked: list[tuple[list[int], dict[str, Any]]]
    is_shut_down = False

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments, self.asked = arguments, []

    async def generate(self, prompt: dict[str, list[int]], params: dict[str, Any], request_id: str) -> Any:
        self.asked.append((prompt["prompt_token_ids"], params))
        left = params["max_tokens"]
        while left:
            num = min(2, left)
            left -= num
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1] * num)])

    def shutdown(self) -> None:
        self.is_shut_down = True


def test_vllm_gets_the_same_requests_for_each_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[StandIn] = []

    def from_engine_args(arguments: dict[str, Any]) -> StandIn:
        made.append(StandIn(arguments))
        return made[-1]

    modules = {
        "vllm": {"SamplingParams": dict, "__version__": "0"},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": dict},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(DELTA="delta")},
        "vllm.v1.engine.async_llm": {"AsyncLLM": SimpleNamespace(from_engine_args=from_engine_args)},
    }
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    monkeypatch.setattr(load, "WARM_UP", (50.0, 0.01, 99))
    options: dict[str, Any] = {"model": "random:tiny-qwen3", "config": CONFIG, "spreads": SMALL}
    line = load.run(engines=["vllm"], rates=[40], seconds=0.05, vllm_budgets=[512, 2048], **options)
    assert [(row["engine"], row["budget"]) for row in line["results"]] == [("vllm", 512), ("vllm", 2048)]
    expected = [*load.draw_arrivals(50.0, 0.01, 99, 512, SMALL), *load.draw_arrivals(40, 0.05, 0, 512, SMALL)]
    for engine, budget in zip(made, (512, 2048), strict=True):
        assert [(prompt, params["max_tokens"]) for prompt, params in engine.asked] == [
            (arrival.prompt, arrival.num_output) for arrival in expected
        ]
        assert all(params["ignore_eos"] and params["output_kind"] == "delta" for _, params in engine.asked)
        assert engine.arguments["max_num_batched_tokens"] == budget and engine.is_shut_down
        assert engine.arguments["enable_prefix_caching"] is False and engine.arguments["max_model_len"] == 80
