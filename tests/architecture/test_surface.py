"""What users may rely on: the public names, and README code that runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import minillm
from tests.architecture.scripts import run_script
from tests.architecture.sources import ROOT

README_BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
MAX_EXAMPLE_LINES = 30


def test_public_names() -> None:
    names = [
        "BeamSearchOutput",
        "BeamSearchParams",
        "EngineConfig",
        "FinishReason",
        "LLM",
        "ModelConfig",
        "RequestOutput",
        "SamplingParams",
        "StructuredOutputsParams",
        "Timings",
    ]
    assert sorted(minillm.__all__) == names
    assert all(hasattr(minillm, name) for name in minillm.__all__)
    with pytest.raises(AttributeError, match="made_up"):
        _ = minillm.made_up


def test_the_package_and_the_command_line_start_without_torch() -> None:
    code = "import sys, minillm, minillm.cli; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout == "[]\n"


def test_readme_starts_with_the_two_commands() -> None:
    commands = re.findall(r"^```(?:bash|sh)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert re.findall(r"make \w+", commands[0]) == ["make demo", "make test"]


@pytest.mark.parametrize("code", README_BLOCKS, ids=lambda code: code.splitlines()[0])
def test_readme_code_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_script(code)
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = path.read_text()
    assert len(code.splitlines()) < MAX_EXAMPLE_LINES
    run_script(code)
    assert capsys.readouterr().out.strip()


def test_files_that_the_documents_name_exist() -> None:
    for document in ("README.md", "docs/tour.md"):
        text = (ROOT / document).read_text()
        named = set(re.findall(r"`((?:minillm|docs|scripts|tests|examples)/[\w./-]+)`", text))
        named |= {str(Path(document).parent / link) for link in re.findall(r"\]\(([\w./-]+)\)", text)}
        missing = sorted(name for name in named if not (ROOT / name).exists())
        assert named and missing == [], f"{document} names files that are not there"
