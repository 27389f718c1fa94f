"""Habits of the design that code cannot drift from: names, unsafe calls, inputs of the process, options that count."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

from minillm.config import EngineConfig
from minillm.types import SamplingParams
from tests.architecture.sources import ROOT, module_of, python_files, tree_of

FILES = python_files("minillm")
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
UNSAFE = ("eval", "exec", "pickle", "cPickle", "marshal", "shelve", "torch.load", "numpy.load", "np.load", "os.system")
PROCESS_INPUTS = ("os.environ", "os.getenv", "sys.argv")
MAY_READ_PROCESS_INPUTS = ("cli", "cli_bench", "__main__")


def names_used(tree: ast.AST) -> set[str]:
    """Every name and dotted name in the code: `a`, `a.b`, and what is imported."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            found.add(ast.unparse(node))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def habit_errors(tree: ast.Module, module: str) -> list[str]:
    """What a file does that the design forbids."""
    used = names_used(tree)
    errors = [f"{name}: loads or runs what a file says" for name in UNSAFE if name in used]
    if module not in MAY_READ_PROCESS_INPUTS:
        errors += [f"{name}: only cli reads it" for name in PROCESS_INPUTS if name in used]
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "shell":
            errors.append(f"line {node.value.lineno}: a shell reads what it is given as code")
        if isinstance(node, ast.Global):
            errors.append(f"line {node.lineno}: module-level mutable state")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith(("get_", "set_")):
            errors.append(f"line {node.lineno}: {node.name}: no get_ and set_ names")
        elif isinstance(node, ast.arg | ast.Name | ast.Attribute) and ast.unparse(node).endswith("is_prefill"):
            errors.append(f"line {node.lineno}: is_prefill: a step knows tokens, not phases")
    if module.rpartition(".")[2] in ("utils", "helpers", "common", "misc"):
        errors.append(f"{module} is no duty")
    return errors


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_habits(path: Path) -> None:
    assert habit_errors(tree_of(path), module_of(path)) == []


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')",
        "import pickle",
        "subprocess.run('x', shell=True)",
        "from pickle import loads",
        "torch.load(path)",
        "os.environ['X']",
        "from os import environ",
        "def get_x(): ...",
        "def f(is_prefill): ...",
        "def f():\n    global x",
    ],
)
def test_a_bad_habit_is_seen(code: str) -> None:
    assert habit_errors(ast.parse(code), "core.queue") != []


def test_the_cli_may_read_the_environment() -> None:
    assert habit_errors(ast.parse("os.environ['X']"), "cli") == []


@pytest.mark.parametrize("config", [EngineConfig, SamplingParams])
def test_every_option_is_read(config: type) -> None:
    """An option that nothing reads is ignored, and ignored options are errors."""
    defined_in = ROOT.joinpath(*config.__module__.split(".")).with_suffix(".py")
    read = {
        node.attr
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and path != defined_in
    }
    through_properties = {"stop": "stop_strings"}
    fields = {through_properties.get(field.name, field.name) for field in dataclasses.fields(config)}
    assert sorted(fields - read) == []


def test_no_test_sleeps() -> None:
    sleeping = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in python_files("tests")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "sleep"
    ]
    assert sleeping == []
