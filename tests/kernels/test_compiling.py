"""Kernels are compiled ahead on threads, none of them is launched meanwhile, and none is compiled a second time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_launches_find_their_kernels_compiled(tmp_path: Path) -> None:
    """In a process of its own, as Triton's interpreter is chosen at import; for an H100, which need not be there."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.kernels.compile_without_gpu"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == {
        "launched while compiling": ["subtract_kernel"],
        "compiled": 4,
        "loaded off the main thread": 4,
        "sum of what was left unwritten": 0.0,
        "launched": ["add_kernel", "add_kernel", "double_kernel", "subtract_kernel"],
        "compiled later": 0,
        "is memory poisoned": True,
    }
