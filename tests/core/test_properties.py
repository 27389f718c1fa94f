"""Random worlds: whatever comes, all that `world.py` asserts holds, and every output is that of the naive engine."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.core.world import STATES, World

NUM_CONFIGURATIONS = 1200
ROOT = Path(__file__).parents[2]


def digest(seeds: range) -> str:
    """Of all plans of these worlds."""
    return hashlib.sha256(b"".join(plan for seed in seeds for plan in World(seed).run().trace)).hexdigest()


def test_a_few_worlds() -> None:
    for seed in range(10_000, 10_100):
        World(seed).run()


def test_a_thousand_worlds_in_which_everything_happens_often() -> None:
    counts: Counter[str] = Counter()
    for seed in range(NUM_CONFIGURATIONS):
        counts += World(seed).run().counts
    assert counts["preemption"] >= 2000
    assert counts["prefix hit"] >= 5000
    assert counts["fork shared"] >= 500 and counts["fork copied"] >= 500
    assert counts["row reused in flight"] >= 500
    assert counts["seated before a half-done prompt"] >= 200
    for state in STATES:
        assert counts[f"abort {state}"] >= 500, state


def test_two_processes_plan_the_same() -> None:
    program = "from tests.core.test_properties import digest; print(digest(range(20)))"
    printed = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert printed[0] == printed[1] != "" and printed[0].strip() == digest(range(20))
