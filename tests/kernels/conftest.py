"""Fixtures of the kernel tests: the device (Triton's interpreter where there is no GPU) and random mixed batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.kernels import gpu


@pytest.fixture
def device() -> torch.device:
    """Where Triton kernels run in this process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_batch(
    rows: list[tuple[int, int]],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device,
    seed: int = 0,
) -> tuple[Tensor, dict[str, Any]]:
    """q_TNH and the other arguments of `attention` for rows of (queries, context), decodes in front.

    Blocks lie in random order, seats too. Every slot that no row owns is NaN, and tables lead to such blocks beyond a
    row's context: whoever reads too far fails.
    """
    random = torch.Generator().manual_seed(seed)
    counts = [count for count, _ in rows]
    num_decodes = next((i for i, count in enumerate(counts) if count != 1), len(rows))
    num_seats, width = len(rows) + 3, max(-(-context // block_size) for _, context in rows) + 2
    used = [-(-context // block_size) for _, context in rows]
    num_blocks = sum(used) + 2
    shuffled = torch.randperm(num_blocks - 1, generator=random) + 1
    kv_2BKPH = torch.full((2, num_blocks, num_kv_heads, block_size, head_size), torch.nan)
    tables_SM = torch.full((num_seats, width), int(shuffled[-1]), dtype=torch.int32)
    seats_R = torch.randperm(num_seats, generator=random)[: len(rows)]
    at = 0
    for (_, context), seat, num_used in zip(rows, seats_R.tolist(), used, strict=True):
        tables_SM[seat, :num_used] = shuffled[at : at + num_used].int()
        slots = torch.arange(context)
        blocks = tables_SM[seat].long()[slots // block_size]
        values = torch.randn(context, 2, num_kv_heads, head_size, generator=random)
        kv_2BKPH[:, blocks, :, slots % block_size] = values
        at += num_used
    q_TNH = torch.randn(sum(counts), num_heads, head_size, generator=random)
    return q_TNH.to(device, dtype), {
        "kv_2BKPH": kv_2BKPH.to(device, dtype),
        "block_tables_SM": tables_SM.to(device),
        "rows_R": seats_R.int().to(device),
        "query_starts_R1": torch.tensor([0, *counts]).cumsum(0).int().to(device),
        "context_lens_R": torch.tensor([context for _, context in rows], dtype=torch.int32, device=device),
        "scale": head_size**-0.5,
        "num_decodes": num_decodes,
        "max_query_len": max(counts),
        "max_context_len": max(context for _, context in rows),
    }


@pytest.fixture
def found_without_gpu(tmp_path: Path) -> Callable[[str], Any]:
    """Runs a module that compiles for an H100, which need not be there, and gives the JSON that it ends with.

    In a process of its own, as Triton's interpreter is chosen at import.
    """

    def run(module: str) -> Any:
        environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-m", module]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout.splitlines()[-1])

    return run


@pytest.fixture
def hopper() -> None:
    """Skip where the kernel is not to be used at all."""
    if not torch.cuda.is_available() or not gpu.has_hopper_kernel(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("needs a Hopper GPU and a Triton that the kernel was tested with")


@pytest.fixture
def make_batch() -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """The maker of random mixed batches."""
    return random_batch


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh tensors hold NaN, so that what a kernel leaves unwritten is seen."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
