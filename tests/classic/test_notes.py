"""The code of the first documents (data/*.md, as they have it) runs: only where names are imported from has changed."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from minillm import classic
from tests.architecture.scripts import run_script

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parents[2]
OLD_ROOTS = r"src\.models\.chunked_prefill|src\.models\.mini_llm|src\.config|src\.cache\.kv_cache|src\.inference_engine"
OLD_ROOTS += r"|MiniLLM|KVCache|config|demo_usage"
PREAMBLES = {  # the names that the documents leave open
    "chunked_prefill": """
import torch
from dataclasses import dataclass
torch.manual_seed(0)
input_tensor = torch.randint(0, 32000, (4, 130))
prompt_ids = torch.randint(0, 32000, (1, 100))
variable_length_sequences = [torch.randint(0, 32000, (length,)) for length in (200, 20, 90, 1)]
""",
    "integration": """
import torch
torch.manual_seed(0)
input_ids = torch.randint(0, 32000, (2, 256))
prompt_ids = torch.randint(0, 32000, (2, 40))
""",
}
POSTSCRIPTS = {
    "chunked_prefill": """
assert [tuple(logits.shape) for logits in results] == [(n, 32000) for n in (200, 20, 90, 1)]
assert kv_cache.lengths == (130,) * 4 and output.shape == (2, 1024, 32000) and output.isfinite().all()
assert generated_ids.shape == (1, 150) and torch.equal(generated_ids[:, :100], prompt_ids)
assert [len(tokens) for tokens in generated] == [100] and timing['tokens_per_second'] > 0
""",
    "integration": """
assert output.shape == (2, 256, 32000) and output.isfinite().all() and kv_cache.lengths == (256, 256)
assert generated_ids.shape == (2, 90) and torch.equal(generated_ids[:, :40], prompt_ids)
""",
}


def blocks(name: str, language: str) -> list[str]:
    """The code blocks of a document, with the imports of today."""
    found = re.findall(
        rf"^```{language}\n(.*?)^```$", (DATA / f"{name}.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    return [re.sub(rf"^from (?:{OLD_ROOTS}) import", "from minillm.classic import", code, flags=re.M) for code in found]


@pytest.mark.parametrize(("name", "num_blocks"), [("chunked_prefill", 8), ("integration", 2)])
def test_the_blocks_of_a_document_run_in_a_row(name: str, num_blocks: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks(name, "python")
    assert len(found) == num_blocks
    run_script("\n".join([PREAMBLES[name], *found, POSTSCRIPTS[name]]))
    printed = capsys.readouterr().out
    if name == "chunked_prefill":
        assert re.search(r"Generated 100 tokens in \d+\.\d{3}s\nThroughput: \d+\.\d tokens/sec\n", printed)


def test_the_command_of_a_document_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("chunked_prefill", "bash")
    matched = re.fullmatch(r'python -c "\n(.*)"\n', block, re.DOTALL)
    assert matched
    run_script(matched[1] + "\nassert all(r['tokens_per_second'] > 0 for r in results.values())")
    printed = capsys.readouterr().out
    assert all(f"│ {size} " in printed for size in ("64", "128", "256", "whole"))


def test_every_field_of_the_documents_config_is_there() -> None:
    (block,) = [code for code in blocks("chunked_prefill", "python") if "class ModelConfig" in code]
    scope = {"dataclass": dataclasses.dataclass, "__name__": __name__}
    exec(compile(block, "document", "exec", dont_inherit=True), scope)
    ours = {field.name: field for field in dataclasses.fields(classic.ModelConfig)}
    hints = get_type_hints(classic.ModelConfig)
    theirs = dataclasses.fields(scope["ModelConfig"])  # type: ignore[arg-type]
    assert len(theirs) == 6
    for field in theirs:
        assert ours[field.name].default == field.default, field.name
        assert field.type in (hints[field.name], *get_args(hints[field.name])), field.name


@pytest.mark.parametrize("name", ["test_chunked_prefill", "test_integration"])
def test_the_tests_that_the_documents_run_are_scripts(name: str, tmp_path: Path) -> None:
    command = [sys.executable, Path(__file__).parent / f"{name}.py"]
    environment = {**os.environ, "PYTEST_ADDOPTS": "--collect-only", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and f"{name}.py::test_" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["demo_chunked_prefill", "demo_usage", "performance_analysis"])
def test_the_examples_that_the_documents_name_are_there(name: str) -> None:
    assert (ROOT / "examples" / "classic" / f"{name}.py").is_file()  # tests/architecture/test_surface.py runs them


def test_the_public_names() -> None:
    assert sorted(classic.__all__) == [
        "BatchedChunkedPrefill",
        "ChunkedPrefillMiniLLM",
        "Configs",
        "GenerationConfig",
        "KVCache",
        "MiniLLM",
        "ModelConfig",
        "OptimizedInferenceEngine",
        "TextGenerator",
        "benchmark_chunked_prefill",
        "chunked_generate_with_kv_cache",
    ]
    assert all(hasattr(classic, name) for name in classic.__all__)
