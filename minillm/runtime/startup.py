"""From a model's config to a runner: device, dtype, kernel set, memory, cache and graphs.

The only place that turns "auto" and None into values of a device. It knows no requests and no scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from minillm.config import EngineConfig, ModelConfig
from minillm.core.plan import RowParams, Seat, StepPlan
from minillm.errors import ConfigError, MemoryFitError
from minillm.model.transformer import Transformer
from minillm.runtime.cuda_graphs import decode_sizes
from minillm.runtime.kv_cache import (
    CPU_CACHE_BYTES,
    MemoryBudget,
    estimated_activations,
    free_memory,
    gib,
    make_kv_cache,
)
from minillm.runtime.rows import Rows
from minillm.runtime.runner import Runner


@dataclass(frozen=True, kw_only=True)
class DeviceDefaults:
    """What None means on a kind of device."""

    max_num_batched_tokens: int
    max_num_seqs: int
    block_size: int
    soft_cap: int
    """Equivalent tokens of a step while rows decode: what keeps the gaps between tokens even."""
    tile_steps: tuple[int, ...]
    """Step sizes at the edge of a stair of matrix-product time."""


GPU_DEFAULTS = DeviceDefaults(
    max_num_batched_tokens=8192,
    max_num_seqs=256,
    block_size=16,
    soft_cap=1024,
    tile_steps=(64, 128, *range(256, 8193, 256)),
)
CPU_DEFAULTS = DeviceDefaults(max_num_batched_tokens=512, max_num_seqs=64, block_size=16, soft_cap=128, tile_steps=())


@dataclass(frozen=True)
class Place:
    """Where and how a model computes."""

    device: torch.device
    dtype: torch.dtype
    ops: ModuleType


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """What bounds requests and steps, with every None of EngineConfig decided."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    soft_cap: int
    tile_steps: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Started:
    """A runner that takes plans, and the sizes that plans must keep to."""

    runner: Runner
    sizes: StepSizes
    num_kv_blocks: int
    """Block 0 included."""


def start_runner(config: EngineConfig, model_config: ModelConfig, load: Callable[[Transformer], None]) -> Started:
    """Build a model, fill it by `load`, and give it the memory that is left.

    Raises ConfigError, MemoryFitError and what `load` raises.
    """
    device = choose_device(config.device)
    place = Place(device, choose_dtype(config.dtype, device), kernel_set(device))
    sizes = choose_sizes(config, model_config, device)
    check_weights_fit(model_config, place)
    model = Transformer(
        model_config, ops=place.ops, dtype=place.dtype, device=device, max_positions=sizes.max_model_len
    )
    load(model)
    budget = memory_budget(config, model, place, sizes)
    num_blocks = choose_num_blocks(config, budget, sizes, device)
    kv_cache = make_kv_cache(model_config, num_blocks, sizes.block_size, place.dtype, device)
    max_blocks = min(-(-sizes.max_model_len // sizes.block_size), num_blocks - 1)
    rows = Rows(sizes.max_num_seqs + 1, max_blocks, device)
    is_gpu = device.type == "cuda"
    runner = Runner(model, place.ops, kv_cache, rows, decode_sizes(sizes.max_num_seqs) if is_gpu else ())
    if is_gpu and not config.enforce_eager:
        runner.capture()
    return Started(runner=runner, sizes=sizes, num_kv_blocks=num_blocks)


def choose_sizes(config: EngineConfig, model_config: ModelConfig, device: torch.device) -> StepSizes:
    """Decide every size that a user left open."""
    defaults = GPU_DEFAULTS if device.type == "cuda" else CPU_DEFAULTS
    max_model_len = choose_max_model_len(config, model_config)
    max_num_seqs = config.max_num_seqs or defaults.max_num_seqs
    num_tokens = config.max_num_batched_tokens or defaults.max_num_batched_tokens
    if not config.enable_chunked_prefill:
        num_tokens = max(num_tokens, max_model_len)
    # Even with every row decoding, a step has room for half the usual chunk.
    soft_cap = max(defaults.soft_cap, max_num_seqs + defaults.soft_cap // 2)
    return StepSizes(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=num_tokens,
        block_size=config.block_size or defaults.block_size,
        soft_cap=min(soft_cap, num_tokens),
        tile_steps=defaults.tile_steps,
    )


def choose_device(name: str) -> torch.device:
    """The device that a name means; raises ConfigError if this machine lacks it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdigit())):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if kind == "cuda" and not (torch.cuda.is_available() and int(index or 0) < torch.cuda.device_count()):
        raise ConfigError(f"device {name!r} is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def kernel_set(device: torch.device) -> ModuleType:
    """The kernel set of a device."""
    if device.type == "cuda":
        from minillm.kernels import gpu

        return gpu
    from minillm.kernels import cpu

    return cpu


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """What a dtype's name means on a device."""
    if name == "auto":
        from minillm.kernels import cpu

        return torch.bfloat16 if device.type == "cuda" else cpu.default_dtype()
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def choose_max_model_len(config: EngineConfig, model_config: ModelConfig) -> int:
    """Most positions of a request; raises ConfigError if more are asked for than the model has."""
    if config.max_model_len is None:
        return model_config.max_position
    if config.max_model_len > model_config.max_position:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is more than the model's {model_config.max_position} positions"
        )
    return config.max_model_len


def check_weights_fit(model_config: ModelConfig, place: Place) -> None:
    """Raise MemoryFitError, before anything is read, if the weights alone are too large."""
    free, _ = free_memory(place.device)
    need = model_config.num_params * place.dtype.itemsize
    if need > free:
        raise MemoryFitError(
            f"the weights need {gib(need)} in {place.dtype} and {place.device} has {gib(free)} free; "
            "take a dtype of fewer bytes, a smaller model, or a device with more memory"
        )


def memory_budget(config: EngineConfig, model: Transformer, place: Place, sizes: StepSizes) -> MemoryBudget:
    """Measure (GPU) or estimate (CPU) what a worst step needs, and what is left for the cache."""
    device, itemsize = place.device, place.dtype.itemsize
    free, total = free_memory(device)
    if device.type == "cuda":
        activations = worst_step_bytes(model, place, sizes)
        others = total - free - torch.cuda.memory_reserved(device)
        usable = int(total * config.gpu_memory_utilization) - max(0, others)
        weights = torch.cuda.memory_allocated(device)
    else:
        num_logits = min(sizes.max_num_seqs, sizes.max_num_batched_tokens)
        activations = estimated_activations(model.config, sizes.max_num_batched_tokens, num_logits, itemsize)
        weights = model.num_weight_bytes
        usable = weights + int(free * config.gpu_memory_utilization)
    return MemoryBudget(
        total=usable,
        weights=weights,
        activations=activations,
        bytes_per_token=model.config.kv_bytes_per_token(itemsize),
        max_num_batched_tokens=sizes.max_num_batched_tokens,
    )


def worst_step_bytes(model: Transformer, place: Place, sizes: StepSizes) -> int:
    """Run the largest step against a cache of block 0 alone; its peak of memory. This also compiles the kernels."""
    num_rows = min(sizes.max_num_seqs, sizes.max_num_batched_tokens)
    cache = make_kv_cache(model.config, 1, sizes.block_size, place.dtype, place.device)
    rows = Rows(num_rows + 1, -(-sizes.max_num_batched_tokens // sizes.block_size), place.device)
    plan = StepPlan(step=0)
    params = RowParams(1.0, 50, 0.9, 0.0, 0)
    plan.seats = tuple(Seat(row, row, plan.freed, params) for row in range(1, num_rows + 1))
    for row in range(1, num_rows + 1):
        count = sizes.max_num_batched_tokens // num_rows
        plan.requests.append(row)
        plan.rows.append(row)
        plan.starts.append(0)
        plan.counts.append(count)
        plan.num_logits.append(1)
        plan.num_samples.append(1)
        plan.num_tokens.append(count)
        plan.tokens.extend([0] * count)
    torch.cuda.reset_peak_memory_stats(place.device)
    before = torch.cuda.memory_allocated(place.device)
    Runner(model, place.ops, cache, rows).submit(plan).wait()
    return torch.cuda.max_memory_allocated(place.device) - before


def choose_num_blocks(config: EngineConfig, budget: MemoryBudget, sizes: StepSizes, device: torch.device) -> int:
    """Blocks of the cache, block 0 included; raises MemoryFitError if too few fit."""
    if config.num_kv_blocks is not None:
        num_blocks = config.num_kv_blocks + 1
        need = num_blocks * sizes.block_size
        if need * budget.bytes_per_token > budget.left:
            raise MemoryFitError(f"num_kv_blocks={config.num_kv_blocks}: {budget.explain(need)}")
        return num_blocks
    # A length that the user names must fit; the model's own may be cut to what memory holds.
    at_least = sizes.block_size if config.max_model_len is None else sizes.max_model_len
    useful = sizes.max_num_seqs * sizes.max_model_len
    if device.type == "cpu":
        useful = min(useful, CPU_CACHE_BYTES // budget.bytes_per_token)
    return budget.num_blocks(sizes.block_size, useful, at_least)
