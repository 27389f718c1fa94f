"""`make demo` on machines that lack something: one clear line, and nothing left that the next run would trip over."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

TOO_OLD = "import sys; sys.version, sys.version_info = '3.10.2 (main)', (3, 10, 2); exec(sys.argv.pop(1))"


def make_demo(folder: Path, script: str, python: str = "./fake-python") -> subprocess.CompletedProcess[str]:
    """Run `make demo` in a folder with a Python that is a shell script."""
    (folder / "scripts").mkdir(exist_ok=True)
    for name in ("Makefile", "pyproject.toml", "scripts/install"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "fake-python").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "fake-python").chmod(0o755)
    return subprocess.run(
        ["make", "demo", f"PYTHON={python}", "VENV=.venv"], cwd=folder, capture_output=True, text=True
    )


def test_a_failed_virtual_environment_is_removed(tmp_path: Path) -> None:
    broken = f'if [ "$1" = -m ]; then mkdir -p "$3/bin"; touch "$3/bin/python"; exit 1; fi; exec {sys.executable} "$@"'
    for _ in range(2):
        result = make_demo(tmp_path, broken)
        assert result.returncode and "python3-venv" in result.stderr
        assert not (tmp_path / ".venv").exists()


def test_a_folder_that_was_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "notes").write_text("mine")
    broken = f'if [ "$1" = -m ]; then mkdir -p "$3/bin"; touch "$3/bin/python"; exit 1; fi; exec {sys.executable} "$@"'
    assert make_demo(tmp_path, broken).returncode
    assert (tmp_path / ".venv" / "notes").exists() and not (tmp_path / ".venv" / "bin" / "python").exists()


def test_an_old_python_is_named_before_anything_is_made(tmp_path: Path) -> None:
    result = make_demo(tmp_path, f'shift; exec {sys.executable} -c "{TOO_OLD}" "$@"')
    assert result.returncode and "needs Python 3.11 or newer" in result.stderr and "3.10.2" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_missing_python_is_named(tmp_path: Path) -> None:
    result = make_demo(tmp_path, "#", python="no-such-python")
    assert result.returncode and "no-such-python is not installed" in result.stderr
