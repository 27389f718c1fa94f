"""Import rules and size budgets of the design, checked on the syntax trees. `scripts/check` runs this file."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT, imported_at_start, imports_of, module_of, python_files, tree_of

MAX_FILE_LINES = 400
FILE_BUDGETS = {"minillm/core/scheduler.py": 250}
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 150
MAX_POSITIONAL = 7

SHARED = {"errors", "types"}
ENGINE = {"core", "runtime", "decoding", "text", "model.sources", "analysis", "config"} | SHARED
CLI = {"cli_bench", "model_option", "options"}
ARROWS = {  # a layer -> the modules or packages of ours that it may import, beside itself
    "errors": set(),
    "checks": {"errors"},
    "types": {"checks", "errors"},
    "config": SHARED,
    "core": SHARED,
    "text": SHARED,
    "kernels": set(),
    "model": {"kernels", "config"} | SHARED,
    "runtime": {"core.plan", "model", "kernels", "config"} | SHARED,
    "decoding": {"core"} | SHARED,
    "decoding.draft_model": {"core", "runtime", "decoding"} | SHARED,
    "analysis": {"core", "config"} | SHARED,
    "engine": ENGINE,
    "llm": {"engine", "text", "config"} | SHARED,
    "server": {"engine", "text", "config", "__version__"} | SHARED,
    "classic": {"llm", "engine", "runtime", "model", "kernels", "config"} | SHARED,
    "bench": ENGINE | {"client", "engine", "llm", "model", "kernels", "classic", "__version__"},
    "terminal": SHARED,
    "client": SHARED,
    "cli": ENGINE
    | CLI
    | {"client", "terminal"}
    | {"engine", "llm", "model", "kernels", "classic", "bench", "server", "__version__"},
    "cli_bench": {"bench", "config", "model_option", "options"} | SHARED,
    "model_option": {"model"},
    "options": SHARED,
    "__main__": {"cli"},
    "": {"llm", "config"} | SHARED,  # the package itself: public names only
}
STDLIB_ONLY = ("errors", "checks", "types", "config", "core")
NO_TORCH = ("text", "analysis", "server")  # anywhere in the file
STARTS_WITHOUT_TORCH = ("", "cli", *sorted(CLI), "__main__")  # so that `minillm --help` answers at once
TEST_LIBRARIES = {"transformers", "vllm", "pytest", "hypothesis"}  # a bench may import the first two when it runs

FILES = python_files("minillm")
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def layer_of(module: str) -> str:
    """The row of ARROWS that a module answers to."""
    return module if module in ARROWS else module.partition(".")[0]


def is_within(target: str, names: set[str]) -> bool:
    """Whether `target` (core.plan.StepPlan) is one of `names` or inside one."""
    return any(f"{target}.".startswith(f"{name}.") for name in names)


def arrow_errors(tree: ast.Module, module: str) -> list[str]:
    """Imports of our own that the design does not allow to `module`."""
    layer = layer_of(module)
    allowed = ARROWS[layer] | ({layer} if layer else set())
    ours = [(line, name.partition(".")[2]) for line, name in imports_of(tree) if f"{name}.".startswith("minillm.")]
    return [
        f"line {line}: minillm.{module} may not import minillm.{target}"
        for line, target in ours
        if not is_within(target, allowed)
    ]


def library_errors(tree: ast.Module, module: str) -> list[str]:
    """Libraries that `module` must do without."""
    layer = module.partition(".")[0]
    anywhere = {name.partition(".")[0] for _, name in imports_of(tree)} - {"minillm"}
    at_start = imported_at_start(tree)
    banned = at_start & TEST_LIBRARIES
    if layer in STDLIB_ONLY:
        banned |= anywhere - set(sys.stdlib_module_names)
    if layer in NO_TORCH:
        banned |= anywhere & {"torch", "triton"}
    if layer in STARTS_WITHOUT_TORCH:
        banned |= at_start & {"torch", "triton", "numpy", "tokenizers", "gguf", "huggingface_hub"}
    if layer == "kernels":
        banned |= anywhere - set(sys.stdlib_module_names) - {"torch", "triton"}
    return [f"minillm.{module} may not import {name}" for name in sorted(banned)]


def size_errors(name: str, text: str) -> list[str]:
    """What in a file is over the size budgets."""
    num_lines, limit = len(text.splitlines()), FILE_BUDGETS.get(name, MAX_FILE_LINES)
    errors = [f"{name} has {num_lines} lines, budget {limit}"] if num_lines > limit else []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        is_kernel = any(".jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        limit = MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES
        num_lines = node.end_lineno - node.lineno + 1
        num_positional = len([a for a in node.args.posonlyargs + node.args.args if a.arg not in ("self", "cls")])
        if num_lines > limit:
            errors.append(f"{name}:{node.lineno} {node.name} has {num_lines} lines, budget {limit}")
        if num_positional > MAX_POSITIONAL and not is_kernel:
            errors.append(f"{name}:{node.lineno} {node.name} takes {num_positional} positional parameters")
    return errors


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports(path: Path) -> None:
    module, tree = module_of(path), tree_of(path)
    assert layer_of(module) in ARROWS, f"minillm.{module} belongs to no layer: add it to ARROWS and to the design"
    assert arrow_errors(tree, module) + library_errors(tree, module) == []


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_sizes(path: Path) -> None:
    assert size_errors(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_module_says_its_duty(path: Path) -> None:
    tree = tree_of(path)
    assert not tree.body or ast.get_docstring(tree), "a module opens with its one duty, and what it does not know"


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("core.queue", "from minillm.config import EngineConfig"),
        ("core.queue", "def f():\n    import torch"),
        ("kernels.cpu", "from minillm.model.batch import ForwardBatch"),
        ("kernels.cpu", "import numpy"),
        ("runtime.rows", "from minillm.core.scheduler import Scheduler"),
        ("text.stop", "import torch"),
        ("engine.loop", "from minillm.kernels import cpu"),
        ("cli", "import torch"),
        ("cli", "if True:\n    import torch"),
        ("bench.offline", "from minillm.server import app"),
        ("llm", "from minillm import cli"),
        ("model.layers", "import transformers"),
    ],
)
def test_a_wrong_import_is_seen(module: str, code: str) -> None:
    tree = ast.parse(code)
    assert arrow_errors(tree, module) + library_errors(tree, module) != []


def test_a_right_import_passes() -> None:
    tree = ast.parse("from minillm.core.plan import StepPlan\nfrom minillm import types\nimport torch")
    assert arrow_errors(tree, "runtime.rows") + library_errors(tree, "runtime.rows") == []


def test_a_long_file_a_long_function_and_too_many_parameters_are_seen() -> None:
    text = "def f(a, b, c, d, e, f, g, h):\n" + "    x = 1\n" * MAX_FUNCTION_LINES + "\n" * MAX_FILE_LINES
    assert len(size_errors("minillm/made_up.py", text)) == 3
    assert len(size_errors("minillm/core/scheduler.py", "\n" * 251)) == 1
    kernel = "@triton.jit\ndef f(a, b, c, d, e, f, g, h):\n" + "    x = 1\n" * MAX_FUNCTION_LINES
    assert size_errors("minillm/made_up.py", kernel) == []
