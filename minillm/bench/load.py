"""`minillm bench load`: requests that arrive at random, whether or not those before them are served, in one process.

Poisson arrivals of log-normal lengths (the quantiles of openchat_sharegpt4), the same for every engine at one seed. The
loop is open: nobody holds an arrival back, and a request's times count from it. MiniLLM's steps and arrivals share one
thread; vLLM runs through its AsyncLLM, once for each token budget.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import math
import random
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from rich.console import Console
from rich.table import Table

from minillm.bench.engines import hub_config, optional_import
from minillm.bench.offline import machine, one_off_note, since
from minillm.bench.workload import MAX_TOKEN_ID
from minillm.config import EngineConfig
from minillm.engine.collector import sparing_what_is_there
from minillm.engine.engine import Engine
from minillm.errors import ConfigError, EngineError
from minillm.llm import LLM
from minillm.model.sources import load_config, resolve
from minillm.runtime.startup import choose_device
from minillm.types import SamplingParams

__all__ = ["run"]

ENGINES = ("minillm", "vllm")
WARM_UP = (2.0, 4.0, 99)
"""Arrivals before those that count: requests a second, seconds, added to the seed."""
QUANTILES = (
    *(("TTFT", p, "s") for p in ("p50", "p90")),
    *(("ITL", p, "ms") for p in ("p50", "p90", "p99", "max")),
)
"""Columns of the table."""
P90 = 1.2816
"""Standard deviations from the median to the 90th percentile."""


class Spread(NamedTuple):
    """Log-normal lengths, clipped."""

    p50: float
    p90: float
    least: int
    most: int

    def draw(self, rng: random.Random) -> int:
        """One length."""
        length = math.exp(rng.gauss(math.log(self.p50), math.log(self.p90 / self.p50) / P90))
        return int(min(max(length, self.least), self.most))


PROMPTS = Spread(1730, 5696, 16, 8000)
OUTPUTS = Spread(415, 834, 8, 1500)


class Arrival(NamedTuple):
    """A request to come, `at` seconds after the start."""

    at: float
    prompt: list[int]
    num_output: int


class Served(NamedTuple):
    """When a request arrived and when each of its tokens came, seconds after the start."""

    num_prompt: int
    arrival: float
    token_times: Sequence[float]


class LoadEngine(Protocol):
    """An engine that has loaded a model."""

    name: str
    budget: int
    """Most tokens of a step."""

    def serve(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """Take the requests as they arrive and complete them."""

    def one_offs(self) -> dict[str, int]:
        """As `bench.engines.BenchEngine.one_offs`."""

    def close(self) -> None:
        """Give the memory back."""


def run(
    *,
    engines: Sequence[str] = ("minillm",),
    rates: Sequence[float] = (3.0, 6.0),
    seconds: float = 60.0,
    vllm_budgets: Sequence[int] = (2048,),
    model: str = "random:llama-3.1-8b",
    config: EngineConfig | None = None,
    spreads: tuple[Spread, Spread] = (PROMPTS, OUTPUTS),
) -> dict[str, Any]:
    """Run the load at each rate (requests a second) on each engine; print a table, then a JSON line, also returned.

    `spreads`: lengths of prompts and outputs. Raises ConfigError for an unknown engine or a bad number, else what
    loading raises.
    """
    check(engines, rates, seconds, vllm_budgets)
    config = config or EngineConfig(enable_prefix_caching=False)
    config = replace(config, max_model_len=config.max_model_len or sum(spread.most for spread in spreads))
    vocab_size = load_config(resolve(model)).vocab_size

    def arrivals(rate: float, seconds: float, seed: int) -> list[Arrival]:
        return draw_arrivals(rate, seconds, seed, vocab_size, spreads)

    rows: list[dict[str, Any]] = []
    for make in makers(engines, model, config, vllm_budgets):
        with closing(make()) as engine:
            rate, duration, seed = WARM_UP
            engine.serve(arrivals(rate, duration, config.seed + seed))
            for rate in rates:
                before = engine.one_offs()
                served = engine.serve(arrivals(rate, seconds, config.seed))
                row = {"engine": engine.name, "budget": engine.budget, "qps": rate, **figures(served)}
                rows.append(row | since(engine.one_offs(), before))
        gc.collect()
        torch.cuda.empty_cache()
    line = {
        "bench": "load",
        "model": model,
        "arrival_seconds": seconds,
        "seed": config.seed,
        "results": rows,
        "machine": machine(choose_device(config.device)),
    }
    Console().print(table_of(line))
    print(json.dumps(line), flush=True)
    return line


def check(engines: Sequence[str], rates: Sequence[float], seconds: float, vllm_budgets: Sequence[int]) -> None:
    """Raise ConfigError for what cannot be run."""
    for name in engines:
        if name not in ENGINES:
            raise ConfigError(f"no engine {name!r}; there are {', '.join(ENGINES)}")
    for value, what in [(rate, "qps") for rate in rates] + [(seconds, "seconds")]:
        if not 0 < value < math.inf:
            raise ConfigError(f"{what} must be above 0, not {value}")
    for budget in vllm_budgets:
        if budget < 1:
            raise ConfigError(f"vllm_budget must be at least 1, not {budget}")


def makers(
    engines: Sequence[str], model: str, config: EngineConfig, vllm_budgets: Sequence[int]
) -> Iterator[Callable[[], LoadEngine]]:
    """What makes each engine, vLLM once for each budget."""
    for name in engines:
        if name == "vllm":
            yield from (partial(VLLMLoad, model, config, budget) for budget in vllm_budgets)
        else:
            yield partial(OwnLoad, model, config)


def draw_arrivals(
    rate: float, seconds: float, seed: int, vocab_size: int, spreads: tuple[Spread, Spread] = (PROMPTS, OUTPUTS)
) -> list[Arrival]:
    """The requests of `seconds` and the first after them; `rate` is the mean number a second."""
    rng, ids = random.Random(seed), random.Random(seed + 1)
    highest = min(MAX_TOKEN_ID, vocab_size - 1)
    prompts, outputs = spreads
    arrivals: list[Arrival] = []
    at = 0.0
    while at < seconds:
        at += rng.expovariate(rate)
        num_prompt, num_output = prompts.draw(rng), outputs.draw(rng)
        arrivals.append(Arrival(at, [ids.randint(0, highest) for _ in range(num_prompt)], num_output))
    return arrivals


class OwnLoad:
    """MiniLLM through `Engine.step`."""

    name = "minillm"

    def __init__(self, model: str, config: EngineConfig) -> None:
        self._llm = LLM(model, **asdict(config))
        self.budget = self._llm.engine.scheduler.limits.max_num_batched_tokens

    def serve(self, arrivals: Sequence[Arrival]) -> list[Served]:
        with sparing_what_is_there():  # as servers do, and `LLM.generate`
            return drive(self._llm.engine, arrivals)

    def one_offs(self) -> dict[str, int]:
        metrics = self._llm.engine.metrics
        return {"jit_compiles": metrics.jit_compiles, "graph_captures": metrics.graph_captures}

    def close(self) -> None:
        self._llm.close()
        del self._llm


def drive(engine: Engine, arrivals: Sequence[Arrival], sleep: Callable[[float], None] = time.sleep) -> list[Served]:
    """Step an engine, adding between its steps what has arrived by its clock. Raises EngineError if tokens are lost."""
    waiting, generations = deque(arrivals), []
    start = engine.clock()
    while waiting or engine.has_work:
        while waiting and start + waiting[0].at <= engine.clock():
            at, prompt, num_output = waiting.popleft()
            params = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
            generations.append(engine.add(prompt, params, arrival=start + at))
        if engine.has_work:
            engine.step()
        else:
            sleep(max(0.0, start + waiting[0].at - engine.clock()))
    return complete([[time - start for time in each.timings.token_times] for each in generations], arrivals)


def complete(token_times: Sequence[list[float]], arrivals: Sequence[Arrival]) -> list[Served]:
    """What was served, if each request has the tokens that it asked for; else EngineError."""
    for number, (times, arrival) in enumerate(zip(token_times, arrivals, strict=True)):
        if len(times) != arrival.num_output:
            raise EngineError(f"request {number} got {len(times)} tokens, {arrival.num_output} were asked for")
    return [Served(len(a.prompt), a.at, times) for a, times in zip(arrivals, token_times, strict=True)]


class VLLMLoad:
    """vLLM through its AsyncLLM, with random weights and without detokenisation."""

    name = "vllm"

    def __init__(self, model: str, config: EngineConfig, budget: int) -> None:
        self._vllm = optional_import("vllm")
        if not model.startswith("random:"):
            raise ConfigError(f"vllm runs random: models here, not {model!r}")
        self.budget = budget
        self._num_served = 0
        self._runner = asyncio.Runner()
        with tempfile.TemporaryDirectory() as folder:
            hub = json.dumps(hub_config(load_config(resolve(model))))
            (Path(folder) / "config.json").write_text(hub, encoding="utf-8")
            self._engine = self._runner.run(self._start(folder, config))

    async def _start(self, folder: str, config: EngineConfig) -> Any:
        arguments = importlib.import_module("vllm.engine.arg_utils").AsyncEngineArgs(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs or 256,
            max_num_batched_tokens=self.budget,
            enable_prefix_caching=config.enable_prefix_caching,
            gpu_memory_utilization=config.gpu_memory_utilization,
            disable_log_stats=True,
        )
        return importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM.from_engine_args(arguments)

    def serve(self, arrivals: Sequence[Arrival]) -> list[Served]:
        return complete(self._runner.run(self._serve(arrivals)), arrivals)

    async def _serve(self, arrivals: Sequence[Arrival]) -> list[list[float]]:
        start, tasks = time.monotonic(), []
        for arrival in arrivals:
            await asyncio.sleep(max(0.0, start + arrival.at - time.monotonic()))
            tasks.append(asyncio.create_task(self._serve_one(start, arrival)))
        return await asyncio.gather(*tasks)

    async def _serve_one(self, start: float, arrival: Arrival) -> list[float]:
        params = self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=arrival.num_output,
            ignore_eos=True,
            detokenize=False,
            output_kind=importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA,
        )
        self._num_served += 1
        times: list[float] = []
        prompt = {"prompt_token_ids": arrival.prompt}
        async for output in self._engine.generate(prompt, params, str(self._num_served)):
            times.extend([time.monotonic() - start] * len(output.outputs[0].token_ids))
        return times

    def one_offs(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        self._engine.shutdown()
        self._runner.close()


def figures(served: Sequence[Served]) -> dict[str, float]:
    """Rates over the time from the start to the last token; quantiles of TTFT and of every gap between tokens."""
    seconds = max(each.token_times[-1] for each in served)
    num_output = sum(len(each.token_times) for each in served)
    ttft = [each.token_times[0] - each.arrival for each in served]
    itl = [b - a for each in served for a, b in pairwise(each.token_times)] or [0.0]
    return {
        "requests": len(served),
        "seconds": round(seconds, 1),
        "output_tok_s": round(num_output / seconds, 1),
        "total_tok_s": round((num_output + sum(each.num_prompt for each in served)) / seconds, 1),
        **{f"ttft_p{round(100 * p)}_s": round(quantile(ttft, p), 3) for p in (0.5, 0.9)},
        **{f"itl_p{round(100 * p)}_ms": round(1e3 * quantile(itl, p), 1) for p in (0.5, 0.9, 0.99)},
        "itl_max_ms": round(1e3 * max(itl), 1),
    }


def quantile(values: Sequence[float], p: float) -> float:
    """The value below which a share `p` of them lies.

    >>> quantile([3.0, 1.0, 2.0, 4.0], 0.5)
    3.0
    """
    return sorted(values)[min(len(values) - 1, int(p * len(values)))]


def table_of(line: dict[str, Any]) -> Table:
    """The figures for people."""
    notes = [f"arrivals for {line['arrival_seconds']:g} s, seed {line['seed']}", *map(one_off_note, line["results"])]
    table = Table(
        title=f"load · {line['model']} · {line['machine']['device']}",
        caption="; ".join(filter(None, dict.fromkeys(notes))),
    )
    table.add_column("engine, budget", no_wrap=True)
    names = {f"{what} {p} {unit}": f"{what.lower()}_{p}_{unit}" for what, p, unit in QUANTILES}
    for name in ("QPS", "tok/s out", *names):
        table.add_column(name, justify="right")
    for row in line["results"]:
        figures = [f"{row[key]:.3f}" if key.endswith("_s") else f"{row[key]:.1f}" for key in names.values()]
        table.add_row(f"{row['engine']} {row['budget']:,}", f"{row['qps']:g}", f"{row['output_tok_s']:,.0f}", *figures)
    return table
