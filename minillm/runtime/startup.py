"""From a model's config to a runner: device, dtype, kernel set, memory, cache and graphs.

The only place that turns "auto" and None into values of a device. It knows no requests and no scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import torch

from minillm.config import EngineConfig, ModelConfig
from minillm.errors import ConfigError, MemoryFitError
from minillm.model.transformer import Transformer
from minillm.runtime.batching import NUM_SAMPLE_COLUMNS, PaddedShapes
from minillm.runtime.cuda_graphs import STEP_TOKENS, padded_shapes, padding, run_each_shape
from minillm.runtime.edits import LogitEdits
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

MIN_DRAFTING_ROWS = 4
"""With speculation a step samples at least what so many rows of drafts need, whatever max_num_seqs."""
ROTARY_BYTES = 8
"""Of the rotary table, per position and entry of a head: fp32, and as much while it is made."""
TABLE_ENTRY_BYTES = 4
"""Of a block table, per block that a row can hold."""


@dataclass(frozen=True, kw_only=True)
class DeviceDefaults:
    """What None means on a kind of device."""

    max_num_batched_tokens: int
    max_num_seqs: int
    block_size: int
    soft_cap: int
    """Equivalent tokens of a step while rows decode: what keeps the gaps between tokens even."""
    soft_cap_few: int
    """The same while few rows decode, and these read few keys."""
    flops_per_byte: float
    """Operations of matrix products in the time in which a byte of keys is read."""
    attention_rate: float
    """Speed of a chunk's attention, in operations, over that of matrix products."""
    tile_steps: tuple[int, ...]
    """Step sizes at the edge of a stair of matrix-product time; on a GPU those that steps are padded to."""


GPU_DEFAULTS = DeviceDefaults(
    max_num_batched_tokens=8192,
    max_num_seqs=256,
    block_size=16,
    soft_cap=1280,
    soft_cap_few=720,
    flops_per_byte=250,
    attention_rate=0.6,
    tile_steps=STEP_TOKENS,
)
CPU_DEFAULTS = DeviceDefaults(
    max_num_batched_tokens=512,
    max_num_seqs=64,
    block_size=16,
    soft_cap=128,
    soft_cap_few=128,
    flops_per_byte=10,
    attention_rate=1.0,
    tile_steps=(),
)


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
    max_num_samples: int
    """Positions that a step may sample: a token of every row, or of fewer rows with drafts."""
    block_size: int
    soft_cap: int
    soft_cap_few: int
    many_keys: int | None
    attention_equivalence: float
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
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return started_on(device, config, model_config, load)


def started_on(
    device: torch.device, config: EngineConfig, model_config: ModelConfig, load: Callable[[Transformer], None]
) -> Started:
    """`start_runner` on a device, which is the current one where kernels are launched."""
    place = Place(device, choose_dtype(config.dtype, device), kernel_set(device))
    sizes = choose_sizes(config, model_config, place)
    check_weights_fit(model_config, place, sizes.max_model_len)
    is_gpu = device.type == "cuda"
    is_drafting = config.max_drafts > 0
    shapes = padded_shapes(sizes.max_num_samples, sizes.max_num_batched_tokens, is_drafting) if is_gpu else None
    with nullcontext() if shapes is None else compiling_kernels(model_config, place, sizes, shapes):
        model = Transformer(
            model_config,
            ops=place.ops,
            dtype=place.dtype,
            device=device,
            max_positions=sizes.max_model_len,
            keeps_codes=config.dtype == "auto" and not is_gpu,
        )
        load(model)
    budget = memory_budget(config, model, place, sizes)
    num_blocks = choose_num_blocks(config, budget, sizes, device)
    kv_cache = make_kv_cache(model_config, num_blocks, sizes.block_size, place.dtype, device)
    max_blocks = min(-(-sizes.max_model_len // sizes.block_size), num_blocks - 1)
    rows = Rows(sizes.max_num_seqs + 1, max_blocks, device)
    runner = Runner(model, place.ops, kv_cache, rows, shapes)
    # Standard attention, for heads that the kernels do not take, asks the device for lengths: no graph can hold that.
    if is_gpu and not config.enforce_eager and model_config.head_size <= place.ops.MAX_HEAD_SIZE:
        runner.capture()
    return Started(runner=runner, sizes=sizes, num_kv_blocks=num_blocks)


def choose_sizes(config: EngineConfig, model_config: ModelConfig, place: Place) -> StepSizes:
    """Decide every size that a user left open."""
    defaults = GPU_DEFAULTS if place.device.type == "cuda" else CPU_DEFAULTS
    max_model_len = choose_max_model_len(config, model_config)
    max_num_seqs = config.max_num_seqs or defaults.max_num_seqs
    num_tokens = config.max_num_batched_tokens or defaults.max_num_batched_tokens
    if not config.enable_chunked_prefill:
        if config.max_num_batched_tokens is not None and num_tokens < max_model_len:
            raise ConfigError(
                f"without chunked prefill a step takes a whole prompt: raise max_num_batched_tokens {num_tokens} to "
                f"max_model_len {max_model_len}, or set a lower max_model_len"
            )
        num_tokens = max(num_tokens, max_model_len)
    # Even with every row decoding, a step has room for half the usual chunk.
    soft_cap = min(max(defaults.soft_cap, max_num_seqs + defaults.soft_cap // 2), num_tokens)
    soft_cap_few = min(defaults.soft_cap_few, num_tokens)
    layer_flops = 2 * model_config.num_layers * model_config.num_layer_params
    reading_rate = defaults.flops_per_byte * model_config.kv_bytes_per_token(place.dtype.itemsize)
    min_samples = MIN_DRAFTING_ROWS * (1 + config.max_drafts) if config.speculative else 1
    return StepSizes(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=num_tokens,
        max_num_samples=min(num_tokens, max(max_num_seqs, min_samples)),
        block_size=config.block_size or defaults.block_size,
        soft_cap=soft_cap,
        soft_cap_few=soft_cap_few,
        # Who reads so many is used to longer steps: the cap rises by tokens whose products take twice as long as that.
        many_keys=round((soft_cap - soft_cap_few) / 4 * layer_flops / reading_rate) or None,
        attention_equivalence=defaults.attention_rate * model_config.attention_equivalence,
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


def check_weights_fit(model_config: ModelConfig, place: Place, max_model_len: int) -> None:
    """Raise MemoryFitError, before anything is read, if weights and rotary table alone are too large."""
    free, _ = free_memory(place.device)
    need = model_config.num_params * place.dtype.itemsize
    if need > free:
        half = model_config.num_params * 2
        advice = f'dtype="bfloat16" ({gib(half)}), ' if half <= free < need else ""
        raise MemoryFitError(
            f"the weights need {gib(need)} in {place.dtype} and {place.device} has {gib(free)} free; "
            f"take {advice}a smaller model, or a device with more memory"
        )
    table = max_model_len * model_config.head_size * ROTARY_BYTES
    if need + table > free:
        raise MemoryFitError(
            f"the weights need {gib(need)}, the rotary table of max_model_len {max_model_len} positions {gib(table)}, "
            f"and {place.device} has {gib(free)} free: lower max_model_len"
        )


def memory_budget(config: EngineConfig, model: Transformer, place: Place, sizes: StepSizes) -> MemoryBudget:
    """Measure (GPU) or estimate (CPU) what a worst step needs, and what is left for the cache."""
    device, itemsize, num_tokens = place.device, place.dtype.itemsize, sizes.max_num_batched_tokens
    num_logits = sizes.max_num_samples
    smaller = max(1, num_tokens // 4)
    estimated, estimated_smaller = (
        estimated_activations(model.config, num, min(num_logits, num), itemsize) for num in (num_tokens, smaller)
    )
    if device.type == "cuda":
        # Twice with graphs: what they hold is a pool of its own, and each shape runs once before it is captured.
        activations = worst_step_bytes(model, place, sizes) * (1 if config.enforce_eager else 2)
        torch.cuda.empty_cache()  # what loading and that step left over
        free, memory = free_memory(device)
        weights = torch.cuda.memory_reserved(device)
        taken = max(0, memory - free - weights)
    else:
        memory, _ = free_memory(device)
        activations, weights = estimated, model.num_weight_bytes
        taken = -weights  # they are there already, and `memory` is what is free beside them
    num_seats = sizes.max_num_seqs + 1
    tables = num_seats * -(-sizes.max_model_len // sizes.block_size) * TABLE_ENTRY_BYTES
    tables += LogitEdits.num_bytes(num_seats, model.config.vocab_size, sizes.max_model_len)
    return MemoryBudget(
        memory=memory,
        utilization=config.gpu_memory_utilization,
        taken=taken,
        weights=weights,
        activations=activations + tables,
        bytes_per_token=model.config.kv_bytes_per_token(itemsize),
        block_size=sizes.block_size,
        step_tokens=num_tokens,
        smaller_step_tokens=smaller,
        smaller_activations=activations * estimated_smaller // estimated + tables,
    )


def compiling_kernels(
    model_config: ModelConfig, place: Place, sizes: StepSizes, shapes: PaddedShapes
) -> AbstractContextManager[None]:
    """While the body loads the weights, threads compile the kernels of all steps: of the same model with two layers."""
    from minillm.kernels.compiling import compiling_ahead

    small = replace(model_config, num_layers=min(2, model_config.num_layers))

    def launch_all() -> None:
        model = Transformer(
            small, ops=place.ops, dtype=place.dtype, device=place.device, max_positions=sizes.max_model_len
        )
        model.finish_loading()
        cache = make_kv_cache(small, 1, sizes.block_size, place.dtype, place.device)
        rows = Rows(sizes.max_num_seqs + 1, -(-sizes.max_model_len // sizes.block_size), place.device)
        runner = Runner(model, place.ops, cache, rows, shapes)
        run_each_shape(runner, shapes, sizes.max_num_batched_tokens, place.device)

    return compiling_ahead(launch_all)


def worst_step_bytes(model: Transformer, place: Place, sizes: StepSizes) -> int:
    """Run the largest step, all padding, on a cache of block 0 alone: its peak of memory."""
    num_rows = sizes.max_num_samples
    cache = make_kv_cache(model.config, 1, sizes.block_size, place.dtype, place.device)
    runner = Runner(model, place.ops, cache, Rows(num_rows + 1, 1, place.device))
    torch.cuda.reset_peak_memory_stats(place.device)
    before = torch.cuda.memory_allocated(place.device)
    with torch.inference_mode():
        nothing = partial(torch.zeros, dtype=torch.int32, device=place.device)
        x_TD = runner.run_layers(*padding(num_rows, sizes.max_num_batched_tokens, False, place.device))
        runner.finish(x_TD, nothing(NUM_SAMPLE_COLUMNS, num_rows), (True, True))
    torch.cuda.synchronize(place.device)
    return torch.cuda.max_memory_allocated(place.device) - before


def choose_num_blocks(config: EngineConfig, budget: MemoryBudget, sizes: StepSizes, device: torch.device) -> int:
    """Blocks of the cache, block 0 included; raises MemoryFitError if too few fit."""
    if config.num_kv_blocks is not None:
        if config.num_kv_blocks * sizes.block_size > budget.num_tokens:
            raise MemoryFitError(budget.explain(config.num_kv_blocks * sizes.block_size, "num_kv_blocks"))
        return config.num_kv_blocks + 1
    # A length that the user names must fit; the model's own may be cut to what memory holds.
    at_least = sizes.block_size if config.max_model_len is None else sizes.max_model_len
    if at_least > budget.num_tokens:
        raise MemoryFitError(budget.explain(at_least, "max_model_len"))
    useful = sizes.max_num_seqs * -(-sizes.max_model_len // sizes.block_size) * sizes.block_size
    if device.type == "cpu":
        useful = max(at_least, min(useful, CPU_CACHE_BYTES // budget.bytes_per_token))
    return -(-min(budget.num_tokens, useful) // sizes.block_size) + 1
