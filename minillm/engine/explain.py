"""Why a request took as long as it did: the timeline's figures of it, and the same in words. Ids, never contents."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from minillm.engine.timeline import REASONS, StepRecord, Story, Timeline

__all__ = ["explain"]

MAX_SHOWN_CHUNKS = 64
MAX_SHOWN_IDS = 8
NUM_WORST_GAPS = 3
REASON_WORDS = {"budget": "token budget", "blocks": "KV blocks", "rows": "a free row"}


def explain(timeline: Timeline, number: int, now: float) -> dict[str, Any] | None:
    """A request's account as plain values, `words` among them; None if the timeline does not know the request.

    Figures cover all of its life. Lists of steps and ids cover the steps on record: `first_step_on_record` and later.
    """
    story = timeline.find(number, now)
    if story is None:
        return None
    records = timeline.last_steps()
    timings = story.timings
    end = now if timings.finished is None else timings.finished
    first = timings.token_times[0] if timings.token_times else None
    requeued = 0.0
    if story.preemptions and timings.first_planned is not None:
        requeued = story.queue_seconds - (timings.first_planned - timings.arrival)
    seconds = {
        "total": end - timings.arrival,
        "queue": story.queue_seconds,
        "requeued": requeued,  # the part of it that lies within prefill and decode
        "first_token": None if first is None else first - timings.arrival,
        "prefill": None if first is None or timings.first_planned is None else first - timings.first_planned,
        "decode": None if first is None else end - first,
    }
    account = {
        "request": number,
        "state": state_of(story),
        "seconds": seconds,
        "waits": waits_of(story),
        "behind": waited_behind(records, story, end),
        "num_prompt_tokens": timings.num_prompt_tokens,
        "num_cached_tokens": timings.num_cached_tokens,
        "num_output_tokens": len(timings.token_times),
        "num_chunks": timings.num_chunks,
        "num_starved_steps": story.num_starved,
        "num_mixed_steps": story.num_mixed,
        "seated_in_steps": story.seats,
        "preempted_in_steps": story.preemptions,
        "first_step_on_record": records[0].plan.step if records else None,
        "chunks": chunks_of(records, number),
        "worst_gaps": worst_gaps(records, story),
    }
    return account | {"words": list(words_of(account, timings.itl))}


def state_of(story: Story) -> str:
    """queued, prompt, decoding or ended."""
    if story.request is None:
        return "ended"
    if not story.row:
        return "queued"
    return "decoding" if story.mixed_before is not None else "prompt"


def waits_of(story: Story) -> dict[str, dict[str, float]]:
    """By what the queue waited for, steps and seconds; `step` is the rest: the step under way had to end first."""
    waits: dict[str, dict[str, float]]
    waits = {name: {"steps": story.wait_steps[name], "seconds": story.wait_seconds[name]} for name in REASONS}
    rest = max(0.0, story.queue_seconds - sum(story.wait_seconds.values()))
    return {name: wait for name, wait in waits.items() if wait["steps"]} | {"step": {"steps": 0, "seconds": rest}}


def waited_behind(records: list[StepRecord], story: Story, end: float) -> list[dict[str, Any]]:
    """Stretches of steps in which it was queued, each with what the queue's head waited for and whom that had to wait
    for. If the head was another request, that one comes first among those it waited behind."""
    stretches: list[dict[str, Any]] = []
    for record in records:
        step = record.plan.step
        if not is_queued(story, step) or not story.timings.arrival <= record.planned <= end:
            continue
        for wait in record.plan.waits:
            ahead = (() if wait.request == story.number else (wait.request,)) + wait.behind
            ids = list(dict.fromkeys(number for number in ahead if number != story.number))[:MAX_SHOWN_IDS]
            last = stretches[-1] if stretches else None
            if last is not None and last["reason"] == wait.reason and last["last_step"] == step - 1:
                last["last_step"] = step
                last["requests"] = list(dict.fromkeys([*last["requests"], *ids]))[:MAX_SHOWN_IDS]
            else:
                stretches.append({"reason": wait.reason, "first_step": step, "last_step": step, "requests": ids})
    return stretches


def is_queued(story: Story, step: int) -> bool:
    """Whether it had no row in a step that was planned while it lived."""
    num_seats = sum(seat <= step for seat in story.seats)
    return num_seats == sum(lost <= step for lost in story.preemptions)


def chunks_of(records: list[StepRecord], number: int) -> list[dict[str, Any]]:
    """The steps on record that computed a part of its prompt."""
    chunks = []
    for record in records:
        for request, start, count in record.chunks():
            if request == number:
                chunks.append(
                    {
                        "step": record.plan.step,
                        "start": start,
                        "tokens": count,
                        "num_decodes": record.num_decodes,
                        "seconds": record.seconds,
                    }
                )
    return chunks[:MAX_SHOWN_CHUNKS]


def worst_gaps(records: list[StepRecord], story: Story) -> list[dict[str, Any]]:
    """The longest gaps between its tokens, with the steps on record that ended in each, and their chunks."""
    times = story.timings.token_times
    gaps = sorted(((b - a, a, b) for a, b in zip(times, times[1:], strict=False)), reverse=True)[:NUM_WORST_GAPS]
    shown = []
    for seconds, start, stop in gaps:
        # A token's time is when its step was applied.
        within = [r for r in records if r.applied is not None and start < r.applied <= stop]
        chunks = [(request, count) for r in within for request, _, count in r.chunks()][:MAX_SHOWN_CHUNKS]
        shown.append(
            {
                "seconds": seconds,
                "steps": [r.plan.step for r in within][:MAX_SHOWN_CHUNKS],
                "tokens": sum(r.num_tokens for r in within),
                "chunks": [{"request": request, "tokens": count} for request, count in chunks],
                "was_preempted": any(start <= r.planned < stop and r.plan.step in story.preemptions for r in records),
            }
        )
    return shown


def words_of(account: dict[str, Any], gaps: list[float]) -> Iterator[str]:
    """The account as sentences."""
    seconds, state = account["seconds"], account["state"]
    yield f"Request {account['request']} {'took' if state == 'ended' else 'has run for'} {shown(seconds['total'])}."
    yield waiting_words(account)
    if account["num_chunks"]:
        cached = account["num_cached_tokens"]
        text = f"Its prompt of {account['num_prompt_tokens']} tokens"
        text += f", {cached} of them from the prefix cache," if cached else ""
        text += f" was computed in {count_of(account['num_chunks'], 'chunk')}"
        text += "" if seconds["prefill"] is None else f" within {shown(seconds['prefill'])}"
        if account["num_starved_steps"]:
            text += f"; {count_of(account['num_starved_steps'], 'step')} between them had no budget for it"
        yield text + "."
    if account["preempted_in_steps"]:
        steps = ", ".join(map(str, account["preempted_in_steps"][:MAX_SHOWN_IDS]))
        times = count_of(len(account["preempted_in_steps"]), "time")
        yield (
            f"It lost its KV blocks to requests ahead of it {times}, in step {steps}, went back to the queue for "
            f"{shown(seconds['requeued'])} of the above and was computed again."
        )
    if gaps:
        text = f"{count_of(account['num_output_tokens'], 'token')} came in {shown(seconds['decode'])} after the first"
        text += f": {shown(statistics.median(gaps))} apart at the median, {shown(max(gaps))} at most"
        mixed = account["num_mixed_steps"]
        yield text + (f"; {count_of(mixed, 'step')} meanwhile also computed chunks of prompts." if mixed else ".")
        yield from gap_words(account["worst_gaps"][0], statistics.median(gaps))


def waiting_words(account: dict[str, Any]) -> str:
    """What it waited for in the queue, and behind whom."""
    queue, waits = account["seconds"]["queue"], account["waits"]
    parts = [
        f"{shown(waits[name]['seconds'])} ({count_of(waits[name]['steps'], 'step')}) for {REASON_WORDS[name]}"
        for name in REASONS
        if name in waits
    ]
    rest = waits["step"]["seconds"]
    if not parts:
        return f"It was in the queue for {shown(queue)}, until the next step was planned."
    ids = list(dict.fromkeys(number for stretch in account["behind"] for number in stretch["requests"]))
    behind = f", behind request{'s' * (len(ids) > 1)} {', '.join(map(str, ids[:MAX_SHOWN_IDS]))}" if ids else ""
    last = f"; and {shown(rest)} until the next step was planned" if rest > 0.01 * queue else ""
    return f"It was in the queue for {shown(queue)}: {' and '.join(parts)}{behind}{last}."


def gap_words(gap: dict[str, Any], median: float) -> Iterator[str]:
    """Why the longest gap was long, where the record tells."""
    if gap["was_preempted"]:
        yield f"The longest gap, {shown(gap['seconds'])}, is that of a preemption."
    elif gap["chunks"] and gap["seconds"] > 1.2 * median:
        chunks = [f"{chunk['tokens']} tokens of request {chunk['request']}" for chunk in gap["chunks"][:3]]
        step = ", ".join(map(str, gap["steps"][:3]))
        yield f"The longest gap, {shown(gap['seconds'])}, is step {step}, which also computed {' and '.join(chunks)}."


def count_of(number: float, noun: str) -> str:
    """A number and its noun.

    >>> count_of(2, "step")
    '2 steps'
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def shown(seconds: float) -> str:
    """A time as a sentence has it.

    >>> shown(0.01234), shown(2.5)
    ('12.3 ms', '2.50 s')
    """
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
