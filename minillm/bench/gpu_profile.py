"""Where a GPU step's time goes: kernels by what they do, gaps inside steps and between them, one step as a picture.

A workload runs under torch.profiler, after a run without it. It knows kernels by their names, and a step by its first
kernel, which expands the step's inputs. Times are microseconds. Profiling slows the host, not the kernels: gaps between
steps are bounds from above.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from minillm.bench.workload import Workload, find_shape, make_workload
from minillm.config import EngineConfig
from minillm.errors import ConfigError
from minillm.llm import LLM
from minillm.types import SamplingParams

FIRST_KERNEL = "expand_kernel"
MOVES = ("gpu_memcpy", "gpu_memset")
# What a kernel is for, by the first of these that its name contains.
KINDS = {
    "decode_kernel": "decode attention",
    "merge_kernel": "decode attention",
    "deal_kernel": "decode attention",
    "attention": "prefill attention",
    "hopper_kernel": "prefill attention",
    "row_kernel": "linears",
    "rows_kernel": "linears",
    "stream_kernel": "linears",
    "gated_kernel": "linears",
    "nvjet": "linears",
    "gemm": "linears",
    "cublas": "linears",
    "norm_kernel": "norms",
    "rotary_kernel": "rotary and KV write",
    "silu": "SiLU",
    "scan_kernel": "sampling",
    "pick_kernel": "sampling",
    "filter_kernel": "sampling",
    "keep_kernel": "sampling",
}
COLORS = {
    "decode attention": "#d9622b",
    "prefill attention": "#e8a33d",
    "linears": "#2b6cb0",
    "norms": "#6b8e23",
    "rotary and KV write": "#8e44ad",
    "SiLU": "#16a085",
    "sampling": "#c0392b",
    "other": "#7f8c8d",
}


class Kernel(NamedTuple):
    """A kernel or a copy on the device."""

    name: str
    start: float
    end: float
    is_move: bool

    @property
    def kind(self) -> str:
        """What it is for."""
        return next((kind for part, kind in KINDS.items() if part in self.name), "other")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A run's kernels in the order of their starts, and where its steps begin among them."""

    kernels: list[Kernel]
    firsts: list[int]

    @property
    def steps(self) -> list[list[Kernel]]:
        """Kernels of each step, from its first one to the next step's."""
        ends = [*self.firsts[1:], len(self.kernels)]
        return [self.kernels[begin:end] for begin, end in zip(self.firsts, ends, strict=True)]


def read_trace(events: Iterable[dict[str, Any]]) -> Profile:
    """The device's part of a Chrome trace."""
    kernels = sorted(
        (
            Kernel(event["name"], event["ts"], event["ts"] + event["dur"], event["cat"] in MOVES)
            for event in events
            if event.get("cat") in ("kernel", *MOVES)
        ),
        key=lambda kernel: kernel.start,
    )
    return Profile(kernels=kernels, firsts=[i for i, k in enumerate(kernels) if FIRST_KERNEL in k.name])


def busy_time(kernels: Sequence[Kernel]) -> float:
    """Time in which at least one of the kernels ran."""
    total, reached = 0.0, float("-inf")
    for kernel in kernels:
        total += max(0.0, kernel.end - max(kernel.start, reached))
        reached = max(reached, kernel.end)
    return total


def summary(found: Profile, num_layers: int) -> dict[str, Any]:
    """Figures of the run: step length, idle time in steps and between them, launches and time by kind."""
    computing = [[kernel for kernel in step if not kernel.is_move] for step in found.steps]
    spans = [max(kernel.end for kernel in step) - step[0].start for step in computing]
    idle = [span - busy_time(step) for span, step in zip(spans, computing, strict=True)]
    between = [after[0].start - max(k.end for k in before) for before, after in pairwise(computing)]
    by_kind: dict[str, list[float]] = {}
    for kernel in (kernel for step in computing for kernel in step):
        by_kind.setdefault(kernel.kind, []).append(kernel.end - kernel.start)
    total = sum(map(sum, by_kind.values()))
    whole = sum(spans) + sum(between)
    return {
        "num_steps": len(computing),
        "step_us": round(statistics.median(spans), 1),
        "idle_in_step_us": round(statistics.median(idle), 1),
        "idle_between_us": round(statistics.median(between), 1) if between else None,
        "idle_between_share": round(sum(between) / whole, 4),
        "launches_per_step": statistics.median(len(step) for step in computing),
        "launches_per_layer": round(statistics.median(len(step) for step in computing) / num_layers, 1),
        "kinds": {
            kind: {
                "launches": len(times),
                "mean_us": round(sum(times) / len(times), 2),
                "share": round(sum(times) / total, 4),
            }
            for kind, times in sorted(by_kind.items(), key=lambda item: -sum(item[1]))
        },
    }


def run(*, model: str, workload: str, max_tokens: int, config: EngineConfig, picture: Path | None) -> dict[str, Any]:
    """Profile a workload whose requests ask for at most `max_tokens`; print a table and a JSON line, also returned.

    `picture`: where a drawing of the run's middle step goes (.svg or .png; needs matplotlib). Raises ConfigError
    without a GPU.
    """
    if not torch.cuda.is_available():
        raise ConfigError("a profile of kernels needs a CUDA GPU")
    with LLM(model, **asdict(config)) as llm:
        drawn = make_workload(workload, find_shape(workload, None, None, None), llm.model_config.vocab_size)
        work = replace(drawn, max_tokens=[min(n, max_tokens) for n in drawn.max_tokens])
        generate(llm, work)
        found = traced(llm, work)
        num_layers = llm.model_config.num_layers
    line = {"bench": "profile", "model": model, "workload": workload, "max_tokens": max_tokens}
    line |= summary(found, num_layers) | {"device": torch.cuda.get_device_name()}
    Console().print(table_of(line))
    if picture is not None:
        draw(found.steps[len(found.steps) // 2], picture)
    print(json.dumps(line), flush=True)
    return line


def generate(llm: LLM, work: Workload) -> None:
    """Run the workload to its end."""
    params = [SamplingParams(max_tokens=n, temperature=work.temperature, ignore_eos=True) for n in work.max_tokens]
    llm.generate(work.prompts, params)
    torch.cuda.synchronize()


def traced(llm: LLM, work: Workload) -> Profile:
    """The workload once more, under the profiler."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        generate(llm, work)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(json.loads(path.read_text())["traceEvents"])


def table_of(line: dict[str, Any]) -> Table:
    """The figures for people."""
    caption = (
        f"step {line['step_us']} µs, of it idle {line['idle_in_step_us']}; between steps {line['idle_between_us']} µs; "
        f"{line['launches_per_layer']} launches per layer"
    )
    table = Table(title=f"{line['model']} · {line['workload']} · {line['num_steps']} steps", caption=caption)
    for name in ("kind", "launches", "mean µs", "share"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for kind, row in line["kinds"].items():
        table.add_row(kind, f"{row['launches']:,}", f"{row['mean_us']:.2f}", f"{row['share']:.1%}")
    return table


def draw(step: Sequence[Kernel], path: Path) -> None:
    """One step's kernels as bars on a line of time, coloured by kind."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a picture needs matplotlib: pip install 'minillm[plot]'") from error
    figure = Figure(figsize=(12, 2.4), layout="constrained")
    axes = figure.subplots()
    begin = step[0].start
    for kind, color in COLORS.items():
        bars = [(kernel.start - begin, kernel.end - kernel.start) for kernel in step if kernel.kind == kind]
        if bars:
            axes.broken_barh(bars, (0, 1), facecolors=color, label=kind)
    axes.set(xlabel="µs since the step's first kernel", yticks=[], xlim=(0, max(kernel.end for kernel in step) - begin))
    axes.legend(ncols=len(COLORS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize="small")
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(path)
