"""What this machine can do at best, measured: bytes copied and FLOPs multiplied per second. Knows no model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

GIB = 2**30


@dataclass(frozen=True)
class Yardstick:
    """Rates that a benchmark compares itself with."""

    copied: float
    """Bytes read plus bytes written per second by a large copy."""
    multiplied: float
    """FLOPs per second of a large square matrix product in `dtype`."""
    dtype: str

    def as_dict(self) -> dict[str, float | str]:
        """The rates in TB/s and TFLOP/s."""
        return {
            "copy_tb_s": round(self.copied / 1e12, 4),
            "matmul_tflop_s": round(self.multiplied / 1e12, 4),
            "matmul_dtype": self.dtype,
        }


def measure_yardstick(device: torch.device, dtype: torch.dtype) -> Yardstick:
    """Time a copy (1 GiB on a GPU, 256 MiB on a CPU) and a product of squares (8192 and 1024 wide)."""
    is_gpu = device.type == "cuda"
    num_bytes, width = (GIB, 8192) if is_gpu else (GIB // 4, 1024)
    return Yardstick(
        copied=2 * num_bytes / seconds_to_copy(num_bytes, device),
        multiplied=2 * width**3 / seconds_to_multiply(width, device, dtype),
        dtype=str(dtype).removeprefix("torch."),
    )


def seconds_to_copy(num_bytes: int, device: torch.device) -> float:
    """Shortest time of a copy within the device's memory."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return best_seconds(lambda: target.copy_(source), device)


def seconds_to_multiply(width: int, device: torch.device, dtype: torch.dtype) -> float:
    """Shortest time of a product of two square matrices."""
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    return best_seconds(lambda: torch.mm(a, b), device)


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Shortest time of `work`, seconds, after one run to warm up; on a GPU ten in a row are timed together."""
    num_calls = 10 if device.type == "cuda" else 1
    work()
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(num_calls):
            work()
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / num_calls)
    return best


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
