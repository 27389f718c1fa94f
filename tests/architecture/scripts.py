"""Runs code that users would paste into a file: a tool for tests."""

from __future__ import annotations

__all__ = ["run_script"]


def run_script(code: str) -> None:
    """Run `code` as a script of its own, with no names but its own; it must not fail or warn."""
    exec(compile(code, "script", "exec", dont_inherit=True), {"__name__": "__main__"})
