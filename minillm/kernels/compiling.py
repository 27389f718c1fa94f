"""Triton's compiler from outside: kernels compiled side by side before they are needed, and a count of all of them.

A kernel takes a second or so, one after the other if each is compiled at its first launch. Python's part of that holds
the interpreter's lock; LLVM, ptxas and the C compiler (of a launcher, Triton 3.6) do not. It knows no kernel by name.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.runtime.jit import JITFunction

__all__ = ["Compilations", "compilations", "compiling_ahead"]

MAX_THREADS = 16


@dataclass
class Compilations:
    """A running count."""

    num: int = 0

    def note(self, **_: object) -> None:
        """A kernel was compiled, or read from Triton's cache on disk."""
        self.num += 1


@cache
def compilations() -> Compilations:
    """The count of this process, from the first call on: Triton keeps what is compiled per process, whoever asks."""
    counted = Compilations()
    triton.knobs.compilation.listener = counted.note
    return counted


@contextmanager
def compiling_ahead(launch_all: Callable[[], object]) -> Iterator[None]:
    """Compile what `launch_all` launches while the body runs; where it ends, all is ready on the current device.

    `launch_all` is called at once. Its launches do nothing but name what is to be compiled, and new tensors hold zeros
    where they would hold anything: a valid index, whatever kernel was to write it. All else in it runs as always.
    """
    compilations()  # counts from here on
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        with triton.AsyncCompileMode(threads):
            with launches_noted() as kernels, ZerosForEmpty():
                launch_all()
            yield
        list(threads.map(lambda kernel: make_ready(kernel, device), dict.fromkeys(kernels)))


@contextmanager
def launches_noted() -> Iterator[list[Any]]:
    """Within it a launch compiles its kernel, or asks threads for it, and adds it to the list; nothing runs.

    What other threads launch runs as always.
    """
    kernels: list[Any] = []
    asked: set[tuple[Any, ...]] = set()
    run, thread = JITFunction.run, threading.get_ident()

    def note(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if threading.get_ident() != thread:
            return run(self, *args, grid=grid, warmup=warmup, **options)
        # Triton takes a millisecond to see that a kernel is on its way already; every layer asks again.
        call = (id(self), *map(form_of, args), *((name, form_of(value)) for name, value in options.items()))
        if call not in asked:
            asked.add(call)
            kernels.append(run(self, *args, grid=grid, warmup=True, **options))
        return None

    JITFunction.run = note
    try:
        yield kernels
    finally:
        JITFunction.run = run


def form_of(argument: Any) -> Any:
    """As much of an argument as may decide which form of a kernel it needs; of what is not known, nothing equals it."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    return argument if isinstance(argument, int | float | str | torch.dtype | None) else object()


def make_ready(kernel: Any, device: int | None) -> None:
    """Give a compiled kernel its launcher, and its code to the device: what its first launch would do."""
    if isinstance(kernel, triton.FutureKernel):
        kernel = kernel.result()
    if device is not None:
        torch.cuda.set_device(device)  # a thread's own
    _ = kernel.run


class ZerosForEmpty(TorchFunctionMode):
    """Within it new tensors that would be uninitialised are zeros."""

    makers: Mapping[Any, Callable[..., Tensor]] = {
        torch.empty: torch.zeros,
        torch.empty_like: torch.zeros_like,
        Tensor.new_empty: Tensor.new_zeros,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, or what fills with zeros in its place."""
        return self.makers.get(func, func)(*args, **(kwargs or {}))
