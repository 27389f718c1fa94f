"""`minillm bench offline`: workloads on one engine or several in one run; for each a table and a JSON line.

Figures stand beside what the machine can do, measured in the same run: decode workloads give MBU (bytes that must be
read over bytes that a copy moves in that time), prefill workloads MFU (FLOPs over those of a large matrix product).
On a CPU engines take turns, run by run; on a GPU, where each takes the memory, they run one after the other.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from minillm.bench.engines import ENGINES, BenchEngine, Job
from minillm.bench.workload import Workload, find_shape, make_workload
from minillm.bench.yardstick import Yardstick, measure_yardstick
from minillm.config import EngineConfig, ModelConfig
from minillm.errors import ConfigError, EngineError
from minillm.model.sources import load_config, resolve
from minillm.runtime.startup import choose_device

NUM_BEST_OF = 2
"""Up to so many runs the best one counts; of more, the median."""


@dataclass(kw_only=True)
class Measured:
    """Times of one engine's runs of a workload, seconds."""

    engine: str
    workload: str
    version: str
    dtype: torch.dtype
    reads_codes: bool
    seconds: list[float]
    one_offs: dict[str, int]
    """Kernels compiled and graphs captured in that time, if the engine counts them: none, or the times are too long."""

    @property
    def figure(self) -> float:
        """The time that counts."""
        return min(self.seconds) if len(self.seconds) <= NUM_BEST_OF else statistics.median(self.seconds)


def run(
    *,
    engines: Sequence[str] = ("minillm",),
    workloads: Sequence[str] = ("nano",),
    model: str = "random:qwen3-0.6b",
    config: EngineConfig | None = None,
    num_prompts: int | None = None,
    input_len: int | None = None,
    output_len: int | None = None,
    repeats: int | None = None,
) -> list[dict[str, Any]]:
    """Run each workload on each engine; print a table and a JSON line for each, which are also returned.

    An engine is loaded once for all workloads.

    Raises ConfigError for an unknown engine or workload, or one that an engine cannot run; else what loading raises.
    """
    for name in engines:
        if name not in ENGINES:
            raise ConfigError(f"no engine {name!r}; there are {', '.join(ENGINES)}")
    config = config or EngineConfig(enable_prefix_caching=False)
    shapes = {name: find_shape(name, num_prompts, input_len, output_len) for name in workloads}
    files = resolve(model)
    model_config = load_config(files)
    job = Job(
        model=model,
        files=files,
        model_config=model_config,
        engine_config=config,
        workloads=[make_workload(name, shape, model_config.vocab_size) for name, shape in shapes.items()],
        device=choose_device(config.device),
    )
    num_runs = {name: repeats or shape.repeats for name, shape in shapes.items()}
    measured = list((taking_turns if job.device.type == "cpu" else one_after_another)(job, engines, num_runs))
    yardsticks = {m.dtype: measure_yardstick(job.device, m.dtype) for m in measured}
    lines = []
    for workload in job.workloads:
        of_workload = [m for m in measured if m.workload == workload.name]
        rows = [result_row(m, workload, model_config, yardsticks[m.dtype]) for m in of_workload]
        for row, m in zip(rows, of_workload, strict=True):
            row["speedup"] = round(of_workload[-1].figure / m.figure, 3)
        line = {
            "bench": "offline",
            "model": model,
            "workload": workload.name,
            "num_prompts": len(workload.prompts),
            "num_input_tokens": workload.num_input_tokens,
            "num_output_tokens": workload.num_output_tokens,
            "num_runs": num_runs[workload.name],
            "statistic": "best" if num_runs[workload.name] <= NUM_BEST_OF else "median",
            "results": rows,
            "machine": machine(job.device),
            "yardstick": [yardstick.as_dict() for yardstick in yardsticks.values()],
        }
        lines.append(line)
        Console().print(table_of(line))
        print(json.dumps(line), flush=True)
    return lines


def taking_turns(job: Job, engines: Sequence[str], num_runs: Mapping[str, int]) -> Iterator[Measured]:
    """All engines loaded, one run of each in turn, so that a slow minute of the machine falls on all of them."""
    with ExitStack() as stack:
        loaded = []
        for name in engines:
            loaded.append(ENGINES[name](job))
            stack.callback(loaded[-1].close)
        for workload in job.workloads:
            for engine in loaded:
                engine.prepare(workload)
                engine.run(warm_up(workload))
            before = [engine.one_offs() for engine in loaded]
            seconds = [[timed(engine, workload) for engine in loaded] for _ in range(num_runs[workload.name])]
            one_offs = [since(engine.one_offs(), each) for engine, each in zip(loaded, before, strict=True)]
            for name, engine, times, each in zip(engines, loaded, zip(*seconds, strict=True), one_offs, strict=True):
                yield Measured(
                    engine=name,
                    workload=workload.name,
                    version=engine.version,
                    dtype=engine.dtype,
                    reads_codes=engine.reads_codes,
                    seconds=list(times),
                    one_offs=each,
                )


def since(counts: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    """By how much each count grew.

    >>> since({"jit_compiles": 23}, {"jit_compiles": 20})
    {'jit_compiles': 3}
    """
    return {name: count - before[name] for name, count in counts.items()}


def one_after_another(job: Job, engines: Sequence[str], num_runs: Mapping[str, int]) -> Iterator[Measured]:
    """Each engine loaded, run and closed before the next."""
    for name in engines:
        yield from taking_turns(job, [name], num_runs)
        gc.collect()
        torch.cuda.empty_cache()


def warm_up(workload: Workload) -> Workload:
    """The workload with at most two tokens a request: it compiles and allocates what the measured runs need."""
    return Workload(workload.name, workload.prompts, [min(2, n) for n in workload.max_tokens], workload.temperature)


def timed(engine: BenchEngine, workload: Workload) -> float:
    """Seconds of one run. Raises EngineError if fewer tokens came out than were asked for."""
    start = time.perf_counter()
    num_tokens = engine.run(workload)
    seconds = time.perf_counter() - start
    if num_tokens != workload.num_output_tokens:
        raise EngineError(f"{num_tokens} tokens came out, {workload.num_output_tokens} were asked for")
    return seconds


def result_row(measured: Measured, workload: Workload, model: ModelConfig, yardstick: Yardstick) -> dict[str, Any]:
    """One engine's figures."""
    seconds, num_out = measured.figure, workload.num_output_tokens
    row = {
        "engine": measured.engine,
        "version": measured.version,
        "dtype": str(measured.dtype).removeprefix("torch.") + (" and 4-bit codes" if measured.reads_codes else ""),
        "seconds": round(seconds, 4),
        "runs": [round(s, 4) for s in measured.seconds],
        "output_tok_s": round(num_out / seconds, 1),
        "total_tok_s": round((num_out + workload.num_input_tokens) / seconds, 1),
        **measured.one_offs,
    }
    if measured.reads_codes:
        return row
    if max(workload.max_tokens) > 1:
        share = workload.bytes_moved(model, measured.dtype.itemsize) / seconds / yardstick.copied
        return row | {"mbu": round(share, 4)}
    return row | {"mfu": round(workload.prefill_flops(model) / seconds / yardstick.multiplied, 4)}


def machine(device: torch.device) -> dict[str, Any]:
    """What it ran on: device, threads, versions."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        versions["triton"] = version("triton")
    except PackageNotFoundError:
        versions["triton"] = "none"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "versions": versions}


def table_of(line: dict[str, Any]) -> Table:
    """The figures for people; the speed-up is over the last engine named."""
    parts = (line["model"], line["workload"], f"{line['statistic']} of {line['num_runs']}", line["machine"]["device"])
    captions = [f"speed-up over {line['results'][-1]['engine']}", *filter(None, map(one_off_note, line["results"]))]
    table = Table(title=" · ".join(parts), caption="; ".join(captions))
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "engine": lambda row: str(row["engine"]),
        "dtype": lambda row: str(row["dtype"]),
        "seconds": lambda row: f"{row['seconds']:.3f}",
        "output tok/s": lambda row: f"{row['output_tok_s']:,.1f}",
        "total tok/s": lambda row: f"{row['total_tok_s']:,.1f}",
        "of machine": lambda row: next((f"{row[k]:.1%} {k.upper()}" for k in ("mbu", "mfu") if k in row), "-"),
        "speed-up": lambda row: f"{row['speedup']:.2f}",
    }
    for name in columns:
        table.add_column(name, justify="left" if name in ("engine", "dtype") else "right", no_wrap=name == "engine")
    for row in line["results"]:
        table.add_row(*(show(row) for show in columns.values()))
    return table


def one_off_note(row: dict[str, Any]) -> str:
    """What an engine did in the measured time that it should have done before; empty if it does not say.

    >>> one_off_note({"engine": "minillm", "jit_compiles": 2, "graph_captures": 0})
    'minillm was not warm: 2 kernels compiled, 0 graphs captured'
    """
    if "jit_compiles" not in row:
        return ""
    was_warm = "was warm" if row["jit_compiles"] == row["graph_captures"] == 0 else "was not warm"
    done = f"{row['jit_compiles']} kernels compiled, {row['graph_captures']} graphs captured"
    return f"{row['engine']} {was_warm}: {done}"
