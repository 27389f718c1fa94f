"""Tools: what of a model's answer asks for a call. It knows no HTTP and no model.

Models write calls as JSON, in one of three ways: `<tool_call>{...}</tool_call>` (Qwen and others that follow Hermes),
a list after `[TOOL_CALLS]` (Mistral), or nothing but JSON (Llama). The markers of the latter two may be no text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from minillm.errors import RequestError

__all__ = ["MAX_CALLS", "ToolReader", "call_schema"]

OPEN, CLOSE, LIST = "<tool_call>", "</tool_call>", "[TOOL_CALLS]"
JSON_STARTS = ("{", "[")
MAX_CALLS = 128


class ToolReader:
    """Feed an answer as it comes: text that is no call comes back at once, calls at the end."""

    def __init__(self, names: Sequence[str], max_calls: int = MAX_CALLS) -> None:
        """`names`: of the tools that may be called."""
        self._names, self._max_calls = frozenset(names), max_calls
        self._text = ""
        self._num_sent = 0
        self._held_from: int | None = None
        self.calls: list[dict[str, Any]] = []
        """After `finish`: the calls as OpenAI's API has them."""

    def feed(self, text: str) -> str:
        """Text that is certainly part of no call."""
        self._text += text
        end = self._certain_end()
        certain, self._num_sent = self._text[self._num_sent : end], end
        return certain

    def finish(self) -> str:
        """The end of the answer: the calls are known, and what turned out to be none comes back."""
        held = self._text[self._num_sent :]
        if self._held_from is not None:
            self.calls = calls_in(held, self._names)[: self._max_calls]
        return "" if self.calls else held

    def _certain_end(self) -> int:
        """Where that text ends which cannot become a call any more."""
        if self._held_from is not None:
            return self._held_from
        if not self._num_sent:
            start = self._text.lstrip()
            if not start:
                return 0
            if start.startswith(JSON_STARTS):
                self._held_from = 0
                return 0
        at = self._text.find(OPEN, max(0, self._num_sent - len(OPEN)))
        if at >= 0:
            self._held_from = at
            return at
        num_open = next((n for n in range(len(OPEN) - 1, 0, -1) if self._text.endswith(OPEN[:n])), 0)
        return len(self._text) - num_open


def call_schema(functions: Sequence[dict[str, Any]], name: str | None) -> dict[str, Any]:
    """JSON schema of one call of any of these functions, or of the named one. Raises RequestError."""
    wanted = [function for function in functions if name in (None, function["name"])]
    if not wanted:
        raise RequestError(f"tool_choice names {name!r}, which is none of the tools")
    forms = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": function.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in wanted
    ]
    return forms[0] if len(forms) == 1 else {"anyOf": forms}


def calls_in(text: str, names: frozenset[str]) -> list[dict[str, Any]]:
    """The calls that a text consists of; none if any part of it is no call of a tool that there is."""
    try:
        if text.lstrip().startswith(OPEN):
            parts = [part.partition(CLOSE)[0] for part in text.split(OPEN)[1:]]
            wanted = [json.loads(part) for part in parts]
        else:
            wanted = json.loads(text.strip().removeprefix(LIST))
    except (ValueError, RecursionError):
        return []
    calls = [call_of(value, names) for value in (wanted if isinstance(wanted, list) else [wanted])]
    return [call for call in calls if call is not None] if None not in calls else []


def call_of(value: Any, names: frozenset[str]) -> dict[str, Any] | None:
    """One call in OpenAI's form; None if `value` is none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    function = {"name": value["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"call_{uuid4().hex[:24]}", "type": "function", "function": function}
