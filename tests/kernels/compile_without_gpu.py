"""Run by test_compiling in a process of its own: kernels are compiled for an H100 that is not there, and launched.

Prints one JSON object. The driver below stands in for CUDA's: it knows a target, and notes what it is asked to load and
to launch.
"""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from minillm.kernels.compiling import compilations, compiling_ahead

launched: list[str] = []
loaded_by: list[str] = []


@triton.jit
def add_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.arange(0, SIZE)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets) + 1)


@triton.jit
def double_kernel(x_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.arange(0, SIZE)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) * 2)


@triton.jit
def subtract_kernel(x_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.arange(0, SIZE)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) - 1)


class Launcher:
    def __init__(self, src: Any, metadata: Any) -> None:
        loaded_by.append(threading.current_thread().name)
        self._name = metadata.name

    def __call__(self, *args: Any) -> None:
        launched.append(self._name)


def stand_in() -> SimpleNamespace:
    """As much of a driver as compiling and launching ask for."""
    utils = SimpleNamespace(
        load_binary=lambda *args: (1, 1, 32, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 1 << 17},
    )
    return SimpleNamespace(
        utils=utils,
        launcher_cls=Launcher,
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )


def launch_all() -> Tensor:
    """Three launches of two kernels, one of them in two forms, and one by another thread; what they leave unwritten."""
    x, y = torch.full((64,), 3.0), torch.empty(64)
    add_kernel[(1,)](x, y, SIZE=32)
    add_kernel[(1,)](x, y, SIZE=64)
    double_kernel[(1,)](y, SIZE=64)
    other = threading.Thread(target=lambda: subtract_kernel[(1,)](x, SIZE=64))
    other.start()
    other.join()
    return torch.cat([y, torch.empty_like(y), y.new_empty(3)])


def main() -> None:
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN
    driver.set_active(stand_in())
    counted = compilations()
    made: list[Tensor] = []
    with compiling_ahead(lambda: made.append(launch_all())):
        in_body = list(launched)
    launched.clear()
    report: dict[str, Any] = {
        "sum of what was left unwritten": made[0].sum().item(),
        "launched while compiling": in_body,
        "compiled": counted.num,
        "loaded off the main thread": sum(name != threading.main_thread().name for name in loaded_by),
    }
    made.append(launch_all())
    report |= {
        "launched": launched,
        "compiled later": counted.num - report["compiled"],
        "is memory poisoned": made[1].isnan().all().item(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
