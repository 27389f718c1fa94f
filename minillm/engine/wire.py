"""Commands and reports as MessagePack, between a front end and an engine in another process.

Plain values and bytes of integers: nothing that is read can run code. Columns are int32 in the machine's byte order.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

import msgpack

from minillm.core.plan import ints
from minillm.engine.driver import Command
from minillm.engine.messages import Ending, Load, Report, Submission
from minillm.types import FinishReason, SamplingParams, StructuredOutputsParams, Timings, TokenScore

__all__ = ["Reader", "pack_command", "pack_report", "pack_value", "unpack_command", "unpack_report"]

MAX_MESSAGE = 2**30
DEFAULTS = SamplingParams()


class Reader:
    """Splits a stream of bytes into the values that were packed."""

    def __init__(self) -> None:
        self._unpacker = msgpack.Unpacker(max_buffer_size=MAX_MESSAGE, strict_map_key=False)

    def feed(self, data: bytes) -> Iterator[Any]:
        """The values that are whole now."""
        self._unpacker.feed(data)
        yield from self._unpacker


def pack_value(value: Any) -> bytes:
    """Any plain value."""
    packed: bytes = msgpack.packb(value)
    return packed


def pack_command(command: Command) -> bytes:
    """A command of AsyncEngine."""
    name, arguments = command
    if name == "submit":
        (submission,) = arguments
        given = {f.name: getattr(submission, f.name) for f in fields(Submission)}
        given |= {"prompt": array("i", submission.prompt).tobytes(), "params": params_of(submission.params)}
        return pack_value([name, given])
    return pack_value([name, list(arguments)])


def params_of(params: SamplingParams) -> dict[str, Any]:
    """The fields that are not as by default. A schema travels as text, however deep it is."""
    values = {f.name: getattr(params, f.name) for f in fields(params)}
    wanted = params.structured_outputs
    if wanted is not None:
        parts = {f.name: getattr(wanted, f.name) for f in fields(wanted)}
        values["structured_outputs"] = parts | {"json": wanted.schema}
    return {name: value for name, value in values.items() if value != getattr(DEFAULTS, name)}


def unpack_command(value: Any) -> Command:
    """What `pack_command` packed."""
    name, given = value
    if name == "submit":
        values = given.pop("params")
        if "structured_outputs" in values:
            values["structured_outputs"] = StructuredOutputsParams(**values["structured_outputs"])
        params = SamplingParams(**values)
        return name, (Submission(prompt=list(ints_of(given.pop("prompt"))), params=params, **given),)
    if name == "finish":
        key, reason = given
        return name, (key, FinishReason(reason))
    return name, tuple(given)


def pack_report(report: Report) -> bytes:
    """A report of EngineDriver."""
    columns = [column.tobytes() for column in (report.keys, report.counts, report.tokens)]
    endings = [[*ending[:2], asdict(ending.timings), *ending[3:]] for ending in report.endings]
    rest = [report.scores, report.prompt_scores, report.answers, report.failure]
    return pack_value([list(report.load), *columns, endings, *rest])


def unpack_report(value: Any) -> Report:
    """What `pack_report` packed."""
    load, keys, counts, tokens, endings, scores, prompt_scores, answers, failure = value
    return Report(
        load=Load(*load),
        keys=ints_of(keys),
        counts=ints_of(counts),
        tokens=ints_of(tokens),
        endings=[
            Ending(key, FinishReason(reason), Timings(**timings), number, error)
            for key, reason, timings, number, error in endings
        ],
        scores=[(key, [score_of(each) for each in found]) for key, found in scores],
        prompt_scores=[(key, [each and score_of(each) for each in found]) for key, found in prompt_scores],
        answers=[(number, answer) for number, answer in answers],
        failure=failure,
    )


def score_of(value: Any) -> TokenScore:
    """A score as it was."""
    token, logprob, rank, top = value
    return TokenScore(token, logprob, rank, tuple((token, logprob) for token, logprob in top))


def ints_of(data: bytes) -> array[int]:
    """A column."""
    column = ints()
    column.frombytes(data)
    return column
