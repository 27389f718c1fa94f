"""Known bugs, as edits of the core, and how to plant one in a copy and see whether the suite notices."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
COPIED = ("minillm/core", "minillm/types.py", "minillm/checks.py", "minillm/errors.py", "tests/core")
# No plugins, settings or conftest of the whole suite: they load libraries that the core does without.
SUITE = (
    "-m",
    "pytest",
    "-x",
    "-q",
    "--noconftest",
    "--assert=plain",
    "-p",
    "no:cacheprovider",
    "-c",
    os.devnull,
    "--rootdir=.",
    "tests/core",
)
SLOW = "thousand or processes"


class Edit(NamedTuple):
    """Replace `old`, which stands once in a file of the core, by `new`."""

    file: str
    old: str
    new: str


MUTANTS: dict[str, tuple[Edit, ...]] = {
    "negative budget": (Edit("running.py", "            if not room:\n", "            if room is None:\n"),),
    "negative chunk": (Edit("budget.py", "        if room < self._least_chunk:\n            return 0\n", ""),),
    "reference before check": (
        Edit(
            "kv_manager.py",
            "        num_needed = num_all",
            "        self.pool.share(prefix.blocks)\n        num_needed = num_all",
        ),
        Edit(
            "kv_manager.py",
            "            return False\n        self.pool.share(prefix.blocks)\n",
            "            return False\n",
        ),
    ),
    "full-prompt hit": (
        Edit("kv_manager.py", "is_scored else len(request.tokens) - 1", "is_scored else len(request.tokens)"),
    ),
    "missing rollback": (
        Edit(
            "request.py",
            "self.num_planned = len(self.tokens) - 1",
            "self.num_planned = max(self.num_planned, len(self.tokens) - 1)",
        ),
    ),
    "rejected drafts count as computed": (
        Edit(
            "request.py",
            "        self.reopen()\n        self.num_computed = self.num_planned\n",
            "        self.num_computed = self.num_planned\n        self.reopen()\n",
        ),
    ),
    "stale key": (Edit("block_pool.py", "del self.block_of[self.key_of.pop(block)]", "pass"),),
    "early publish": (
        Edit(
            "kv_manager.py",
            "num_full = request.num_computed // self.block_size",
            "num_full = min(request.num_planned, len(request.tokens)) // self.block_size",
        ),
    ),
    "key of an unread token published": (
        Edit(
            "kv_manager.py",
            "num_full = request.num_computed // self.block_size",
            "num_full = (request.num_computed + request.num_unknown) // self.block_size",
        ),
        Edit(
            "kv_manager.py", '        assert num_blocks * size <= len(request.tokens), "key of an unread token"\n', ""
        ),
    ),
    "no admission check": (
        Edit("kv_manager.py", "if num_needed > self.pool.num_free - self.num_promised - num_reserved:", "if False:"),
    ),
    "promised blocks are forgotten": (Edit("kv_manager.py", " - self.num_promised - num_reserved", " - num_reserved"),),
    "prefill first": (
        Edit("running.py", "for request in self.decodes:", "for request in [] if self.prompts else self.decodes:"),
    ),
    "result credited to a row's new owner": (
        Edit(
            "scheduler.py",
            "in zip(plan.requests, plan.starts,",
            "in zip([next((r.number for r in self._running if r.row == row), 0) for row in plan.rows], plan.starts,",
        ),
        Edit("scheduler.py", "if request is None or step < request.first_step:", "if request is None:"),
    ),
    "result credited to a later seat": (
        Edit("scheduler.py", "if request is None or step < request.first_step:", "if request is None:"),
    ),
    "block freed under a hold": (
        Edit(
            "kv_manager.py",
            "        self.pool.release(reversed(request.blocks))\n",
            "        self.pool.release(reversed(request.blocks))\n"
            "        self.pool.release(block for block in request.blocks if block in self._holds)\n",
        ),
    ),
    "fork without its copy": (Edit("running.py", "if prefix.copied:", "if False:"),),
    "fork of what is not computed yet": (Edit("kv_manager.py", " and parent.first_step < step", ""),),
    "fork shares planned positions": (Edit("kv_manager.py", "min(max_shared, parent.num_computed)", "max_shared"),),
    "readmitted in the step that preempted": (
        Edit("scheduler.py", "        for prompt in (*", "        self._requeue()\n        for prompt in (*"),
    ),
    "not the largest rank preempted": (Edit("running.py", "last = max(", "last = min("),),
    "overtaken without end": (Edit("queue.py", "self._requests[0].num_overtaken += 1", "pass"),),
    "closed row planned": (Edit("running.py", "if count > 1 or request.is_stepwise:", "if request.is_stepwise:"),),
    "length without what is in flight": (
        Edit(
            "scheduler.py", "        request.plan_limit = request.max_len - 1\n", "        request.plan_limit = 2**62\n"
        ),
    ),
    "tokens kept after the end": (
        Edit("request.py", "            if reason is not None:\n                break\n", ""),
    ),
    "freed row kept quiet": (Edit("running.py", "        self._freed.append(request.row)\n", ""),),
    "dummy block handed out": (Edit("block_pool.py", "range(num_blocks - 1, 0, -1)", "range(num_blocks - 1, -1, -1)"),),
    "salt left out": (Edit("kv_manager.py", "blake2b(request.salt, ", "blake2b(b'', "),),
    "parent left out of a key": (
        Edit("kv_manager.py", "blake2b(key + raw[at : at + stride]", "blake2b(raw[at : at + stride]"),
    ),
    "context costs nothing": (Edit("budget.py", "linear = kappa + start", "linear = kappa"),),
    "a long context starves": (
        Edit("budget.py", "max(self._max_soft_chunk(start), self._num_due)", "self._max_soft_chunk(start)"),
    ),
    "every chunk may pass the soft cap": (Edit("budget.py", "        self._num_due = 0\n", ""),),
    "admitted past a prompt that got nothing": (Edit("scheduler.py", 'lack = "budget"', "pass"),),
    "half-done prompts before shorter ones": (
        Edit("scheduler.py", "queue.may_try(index, prompt)", "prompt is None and queue.may_try(index, None)"),
    ),
    "new prompts before half-done ones": (
        Edit("scheduler.py", "queue.may_try(index, prompt)", "queue.may_try(index, None)"),
    ),
    "short prompts before a long one without end": (Edit("queue.py", "self._num_tokens += num_tokens", "pass"),),
    "prompts as they come": (Edit("queue.py", "LENGTH_WEIGHT = 2", "LENGTH_WEIGHT = 0"),),
    "cached tokens make a prompt long": (
        Edit("scheduler.py", "next_place(len(request.tokens) - num_cached)", "next_place(len(request.tokens))"),
    ),
    "one decode blocks all prompts": (Edit("budget.py", "max(1, cap // 2))", "cap)"),),
    "first chunk of several costs nothing": (
        Edit("budget.py", "        self._soft_room -= ", "        self._soft_room -= 0 * "),
    ),
}


def plant(name: str | None, folder: Path) -> None:
    """Copy the core and its tests to `folder`, with the named bug in it."""
    for path in COPIED:
        source, target = ROOT / path, folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "test_mutants.py"))
        else:
            shutil.copy(source, target)
    (folder / "minillm/__init__.py").touch()
    for edit in MUTANTS[name] if name else ():
        path = folder / "minillm/core" / edit.file
        text = path.read_text()
        assert text.count(edit.old) == 1, f"{name}: {edit.old!r} stands {text.count(edit.old)} times in {edit.file}"
        path.write_text(text.replace(edit.old, edit.new))


def run_suite(folder: Path) -> str | None:
    """Run the core's quick tests there; None if they pass, else the first that fails."""
    command = [sys.executable, *SUITE, "-k", f"not ({SLOW})"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode == 0:
        return None
    assert done.returncode == 1, f"the suite did not run:\n{done.stdout}{done.stderr}"
    return next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED"))
