"""Kernels are compiled ahead on threads, none of them is launched meanwhile, and none is compiled a second time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_launches_find_their_kernels_compiled(found_without_gpu: Callable[[str], Any]) -> None:
    assert found_without_gpu("tests.kernels.compile_without_gpu") == {
        "launched while compiling": ["subtract_kernel"],
        "compiled": 4,
        "loaded off the main thread": 4,
        "sum of what was left unwritten": 0.0,
        "launched": ["add_kernel", "add_kernel", "double_kernel", "subtract_kernel"],
        "compiled later": 0,
        "is memory poisoned": True,
    }
