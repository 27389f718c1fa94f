"""From a model's name to a running engine: device, dtype, weights, cache size, scheduler.

The only place that turns "auto" and None into values. It knows no requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from minillm.config import EngineConfig, ModelConfig
from minillm.core.plan import RowParams, Seat, StepPlan
from minillm.core.scheduler import Scheduler, SchedulerLimits
from minillm.engine.engine import Engine
from minillm.errors import ConfigError, MemoryFitError
from minillm.model.sources import ModelFiles, load_config, load_weights, resolve
from minillm.model.transformer import Transformer
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
from minillm.text.tokenizer import Tokenizer, load_tokenizer


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
CPU_DEFAULTS = DeviceDefaults(max_num_batched_tokens=512, max_num_seqs=64, block_size=16, soft_cap=64, tile_steps=())


@dataclass(kw_only=True)
class Launched:
    """A running engine and what it was made from."""

    engine: Engine
    runner: Runner
    tokenizer: Tokenizer
    config: EngineConfig
    model_config: ModelConfig


def launch(model_name: str, config: EngineConfig) -> Launched:
    """Load a model and start its engine.

    Raises ModelNotFoundError, CheckpointError, DownloadError, ConfigError, MemoryFitError.
    """
    device = choose_device(config.device)
    defaults = GPU_DEFAULTS if device.type == "cuda" else CPU_DEFAULTS
    place = Place(device, choose_dtype(config.dtype, device), kernel_set(device))
    files = resolve(model_name)
    model_config = load_config(files)
    max_model_len = choose_max_model_len(config, model_config)
    tokenizer = load_tokenizer(files)
    model = load_model(files, model_config, place, max_model_len, config.seed)
    max_num_seqs = config.max_num_seqs or defaults.max_num_seqs
    step_tokens = config.max_num_batched_tokens or defaults.max_num_batched_tokens
    if not config.enable_chunked_prefill:
        step_tokens = max(step_tokens, max_model_len)
    block_size = config.block_size or defaults.block_size
    sizes = StepSizes(max_num_seqs, step_tokens, block_size)
    budget = memory_budget(config, model, place, sizes)
    num_blocks = choose_num_blocks(config, budget, sizes, max_model_len, device)
    kv_cache = make_kv_cache(model_config, num_blocks, block_size, place.dtype, device)
    rows = Rows(max_num_seqs + 1, min(-(-max_model_len // block_size), num_blocks - 1), device)
    runner = Runner(model, place.ops, kv_cache, rows)
    scheduler = Scheduler(
        SchedulerLimits(
            max_num_batched_tokens=step_tokens,
            soft_cap=min(defaults.soft_cap, step_tokens),
            attention_equivalence=model_config.attention_equivalence,
            tile_steps=defaults.tile_steps,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            num_kv_blocks=num_blocks,
            block_size=block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            enable_chunked_prefill=config.enable_chunked_prefill,
            min_chunk_size=config.min_chunk_size,
            max_chunk_size=config.max_chunk_size,
        )
    )
    engine = Engine(
        scheduler,
        runner,
        vocab_size=model_config.vocab_size,
        eos_token_ids=model_config.eos_token_ids,
        overlap=config.overlap,
        seed=config.seed,
    )
    return Launched(engine=engine, runner=runner, tokenizer=tokenizer, config=config, model_config=model_config)


@dataclass(frozen=True)
class Place:
    """Where and how a model computes."""

    device: torch.device
    dtype: torch.dtype
    ops: ModuleType


@dataclass(frozen=True)
class StepSizes:
    """What bounds one step."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int


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


def load_model(
    files: ModelFiles, model_config: ModelConfig, place: Place, max_model_len: int, seed: int
) -> Transformer:
    """The model with its weights; raises MemoryFitError before anything is read if they cannot fit."""
    free, _ = free_memory(place.device)
    need = model_config.num_params * place.dtype.itemsize
    if need > free:
        raise MemoryFitError(
            f"the weights need {gib(need)} in {place.dtype} and {gib(free)} are free on {place.device}; take a dtype of "
            "fewer bytes, a smaller model, or a device with more memory"
        )
    model = Transformer(
        model_config, ops=place.ops, dtype=place.dtype, device=place.device, max_positions=max_model_len
    )
    load_weights(model, files, seed=seed)
    return model


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


def choose_num_blocks(
    config: EngineConfig, budget: MemoryBudget, sizes: StepSizes, max_model_len: int, device: torch.device
) -> int:
    """Blocks of the cache, block 0 included; raises MemoryFitError if too few fit."""
    if config.num_kv_blocks is not None:
        num_blocks = config.num_kv_blocks + 1
        need = num_blocks * sizes.block_size
        if need * budget.bytes_per_token > budget.left:
            raise MemoryFitError(f"num_kv_blocks={config.num_kv_blocks}: {budget.explain(need)}")
        return num_blocks
    # A length that the user names must fit; the model's own may be cut to what memory holds.
    at_least = sizes.block_size if config.max_model_len is None else max_model_len
    useful = sizes.max_num_seqs * max_model_len
    if device.type == "cpu":
        useful = min(useful, CPU_CACHE_BYTES // budget.bytes_per_token)
    return budget.num_blocks(sizes.block_size, useful, at_least)
