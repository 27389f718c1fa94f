"""Sizing the cache: what fits, what is asked for, what the error says, and that its advice is true."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillm.config import Configs, EngineConfig, ModelConfig
from minillm.errors import ConfigError, MemoryFitError
from minillm.runtime.kv_cache import MemoryBudget, control_group_limit, make_kv_cache
from minillm.runtime.startup import Place, StepSizes, choose_num_blocks, choose_sizes, kernel_set

CPU = torch.device("cpu")
BUDGET = MemoryBudget(
    memory=2_000_000,
    utilization=0.5,
    taken=0,
    weights=400_000,
    activations=200_000,
    bytes_per_token=100,
    block_size=16,
    step_tokens=512,
    smaller_step_tokens=128,
    smaller_activations=50_000,
)


def blocks(config: EngineConfig, budget: MemoryBudget = BUDGET) -> int:
    place = Place(CPU, torch.float32, kernel_set(CPU))
    return choose_num_blocks(config, budget, choose_sizes(config, Configs.SMOLLM2_135M, place), CPU)


def test_a_step_grows_with_the_time_that_its_decodes_take() -> None:
    """On an H100 a key is read in 1/426 of the time of a token's products (Llama 3.1 8B) or 1/31 (Qwen3 0.6B)."""

    def sizes(model: ModelConfig, device: str, dtype: torch.dtype, **options: int) -> StepSizes:
        return choose_sizes(EngineConfig(**options), model, Place(torch.device(device), dtype, kernel_set(CPU)))

    large, small = (sizes(m, "cuda", torch.bfloat16) for m in (Configs.LLAMA_3_1_8B, Configs.QWEN3_0_6B))
    assert large.many_keys == pytest.approx(140 * 426, rel=0.01)
    assert small.many_keys == pytest.approx(140 * 30.7, rel=0.01)
    more = sizes(Configs.LLAMA_3_1_8B, "cuda", torch.bfloat16, max_num_seqs=1024)
    assert more.many_keys == pytest.approx((1664 - 720) / 4 * 426, rel=0.01)
    assert sizes(Configs.QWEN3_0_6B, "cpu", torch.float32).many_keys is None  # one cap for all


def test_what_is_left_holds_whole_blocks_and_the_dummy() -> None:
    assert BUDGET.num_tokens == (400_000 // 1600 - 1) * 16
    assert blocks(EngineConfig()) == 250


def test_no_more_than_is_of_use() -> None:
    assert blocks(EngineConfig(max_num_seqs=2, max_model_len=100)) == 2 * 7 + 1, "each row takes whole blocks"


def test_a_length_that_is_named_fits_or_is_refused() -> None:
    assert blocks(EngineConfig(max_model_len=3984)) == 250
    with pytest.raises(MemoryFitError, match="max_model_len=3984"):
        blocks(EngineConfig(max_model_len=3985))


@pytest.mark.parametrize(("memory", "taken"), [(2_000_000, 0), (2_400_000, 200_000), (1_200_000, -400_000)])
@pytest.mark.parametrize("config", [EngineConfig(num_kv_blocks=312), EngineConfig(max_model_len=5000)])
def test_advice_would_work(config: EngineConfig, memory: int, taken: int) -> None:
    budget = replace(BUDGET, memory=memory, taken=taken)
    with pytest.raises(MemoryFitError) as error:
        blocks(config, budget)
    advised = dict(re.findall(r"(\w+)=([\d.]+\d)", str(error.value)))
    (own,) = [name for name in ("num_kv_blocks", "max_model_len") if getattr(config, name)]
    assert advised.keys() == {own, "max_num_batched_tokens", "gpu_memory_utilization"}
    assert blocks(replace(config, **{own: int(advised[own])}), budget) > 1
    assert blocks(config, replace(budget, activations=BUDGET.smaller_activations)) > 1
    share = float(advised["gpu_memory_utilization"])
    assert blocks(config, replace(budget, utilization=share)) > 1
    with pytest.raises(MemoryFitError):
        blocks(config, replace(budget, utilization=share - 0.01))


def test_nothing_is_advised_that_cannot_help() -> None:
    with pytest.raises(MemoryFitError) as error:
        blocks(EngineConfig(max_model_len=5000), replace(BUDGET, memory=450_000, utilization=1.0))
    assert "=" not in str(error.value)


def test_whole_prompts_need_whole_steps() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens 256 to max_model_len 1000"):
        blocks(EngineConfig(enable_chunked_prefill=False, max_num_batched_tokens=256, max_model_len=1000))


@pytest.mark.parametrize(
    "names",
    [
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ],
)
def test_a_container_counts_file_pages_as_free(tmp_path: Path, names: tuple[str, str, str]) -> None:
    assert control_group_limit(tmp_path) is None
    for name, text in zip(names, ("1000\n", "900\n", "anon 100\ninactive_file 300\n"), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert control_group_limit(tmp_path) == 400
    (tmp_path / names[0]).write_text("max\n")
    assert control_group_limit(tmp_path) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_empty_cache_is_zeros(dtype: torch.dtype) -> None:
    cache = make_kv_cache(Configs.TINY_LLAMA, 5, 16, dtype, CPU)
    assert cache.shape == (2, 2, 5, 2, 16, 16)
    assert cache.dtype == dtype
    assert not cache.any()


GROWTH = """
import os, torch
from minillm.config import Configs
from minillm.runtime.kv_cache import make_kv_cache
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before = resident()
cache = make_kv_cache(Configs.SMOLLM2_135M, 2000, 16, torch.bfloat16, torch.device("cpu"))
empty = resident() - before
cache.fill_(1)
print(empty / cache.nbytes, (resident() - before) / cache.nbytes)
"""


def test_an_empty_cache_takes_no_memory_yet() -> None:
    """In a process of its own, where nothing else comes and goes."""
    out = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True).stdout
    empty, full = map(float, out.split())
    assert empty < 0.1
    assert full > 0.9
