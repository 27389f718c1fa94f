"""`scripts/install`: which PyTorch it fetches where. Pip is a stand-in that reports what it would install."""

from __future__ import annotations

import json
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from tests.architecture.sources import ROOT

CUDA = ["torch", "nvidia-cublas", "triton", "sympy"]
NEW_CUDA = ["torch", "cuda-toolkit", "triton", "sympy"]
PLAIN = ["torch", "sympy"]


@pytest.fixture
def install() -> ModuleType:
    loader = SourceFileLoader("install", str(ROOT / "scripts" / "install"))
    spec = spec_from_loader("install", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def installed(install: ModuleType, packages: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that fetch torch where pip would install `packages` for it."""
    commands = []

    def run(label: str, command: list[str]) -> None:
        if "--dry-run" in command:
            report = {"install": [{"metadata": {"name": name}} for name in packages]}
            Path(command[command.index("--report") + 1]).write_text(json.dumps(report))
        else:
            commands.append(" ".join(command[1:]))

    monkeypatch.setattr(install, "run", run)
    install.install_torch()
    return commands


@pytest.mark.parametrize("packages", [CUDA, NEW_CUDA])
def test_no_cuda_package_without_a_gpu(
    install: ModuleType, packages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "has_gpu", lambda: False)
    first, second = installed(install, packages, monkeypatch)
    assert first.endswith("install -qq uv")
    assert second.startswith("-m uv pip install") and "--torch-backend=cpu torch" in second


def test_a_gpu_has_its_pytorch(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "has_gpu", lambda: True)
    (command,) = installed(install, CUDA, monkeypatch)
    assert command.startswith("-m pip") and "install -qq torch>=" in command


def test_where_pip_has_a_cpu_build_pip_fetches_it(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "has_gpu", lambda: False)
    (command,) = installed(install, PLAIN, monkeypatch)
    assert command.startswith("-m pip") and "install -qq torch>=" in command


@pytest.mark.parametrize("packages", [[], ["sympy"]])
def test_a_pytorch_that_fits_stays(install: ModuleType, packages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed(install, packages, monkeypatch) == []


@pytest.mark.parametrize(
    ("script", "expected"),
    [("echo 'GPU 0: NVIDIA H100 (UUID: GPU-0)'", True), ("echo 'No devices were found'", False), ("exit 9", False)],
)
def test_a_gpu_is_what_the_driver_lists(
    install: ModuleType, script: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not install.has_gpu()
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert install.has_gpu() is expected


def test_what_fails_is_shown(install: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="Fetching failed.*network"):
        install.run("Fetching", ["sh", "-c", "echo no route; exit 3"])
    assert "no route" in capfd.readouterr().err
