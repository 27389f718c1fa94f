"""The suite can fail: with any known bug planted in the core it does, and without one it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.table import MUTANTS, plant, run_suite


def test_without_a_mutant_the_suite_passes(tmp_path: Path) -> None:
    plant(None, tmp_path)
    assert run_suite(tmp_path) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name: str, tmp_path: Path) -> None:
    plant(name, tmp_path)
    assert run_suite(tmp_path) is not None
