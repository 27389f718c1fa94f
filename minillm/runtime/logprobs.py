"""Logprobs of sampled tokens and of prompts' tokens, with the likeliest tokens beside them. It knows no requests.

The device packs each scored token into 32-bit words that follow the step's samples to the host:

    | logprob (fp32 bits) | rank | likeliest tokens k | their logprobs k |     k: the most that a row of the step asks

Shapes: L rows of logits, V vocabulary, M scored tokens, X words of one.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minillm.core.plan import Logprobs, StepPlan
from minillm.runtime.batching import ScoreWords, column, places_of, trailing
from minillm.runtime.rows import Ints

MAX_SCORED_ROWS = 64
"""Rows of logits in fp32 at once: a prompt's would fill the memory."""


class LogprobRows:
    """Who asks for logprobs, by seat; host state alone."""

    def __init__(self, num_seats: int) -> None:
        self.num_top_S = np.full(num_seats, -1, np.int32)
        self.num_prompt_top_S = np.full(num_seats, -1, np.int32)
        self._tokens: dict[int, Ints] = {}

    def words(self, plan: StepPlan, order: Ints) -> ScoreWords | None:
        """Note the plan's new seats, and list the tokens whose logprobs the step reports; None if there are none.

        `order`: planned row of each row of the batch.
        """
        for seat in plan.seats:
            self.num_top_S[seat.row] = seat.params.num_logprobs
            self.num_prompt_top_S[seat.row] = seat.params.num_prompt_logprobs
            if seat.params.num_prompt_logprobs >= 0:
                assert seat.tokens is not None
                self._tokens[seat.row] = column(seat.tokens)
        if self.num_top_S.max() < 0 and self.num_prompt_top_S.max() < 0:
            return None
        rows = column(plan.rows)[order]
        num_samples = column(plan.num_samples)[order]
        num_sampled = np.where(self.num_top_S[rows] >= 0, num_samples, 0)
        is_prompt = (column(plan.num_logits)[order] > num_samples) & (self.num_prompt_top_S[rows] >= 0)
        if not num_sampled.any() and not is_prompt.any():
            return None
        owners, places = places_of(num_sampled)
        starts = (column(plan.starts) + column(plan.counts))[order] - num_samples
        firsts = np.cumsum(num_samples) - num_samples
        parts: list[tuple[Any, ...]] = [
            (
                firsts[owners] + places,
                np.zeros(0),
                order[owners],
                starts[owners] + places + 1,
                self.num_top_S[rows][owners],
            )
        ]
        ends = np.cumsum(column(plan.counts)[order])
        for row in np.flatnonzero(is_prompt):
            parts.append(self._prompt_part(plan, int(order[row]), int(ends[row])))
        flat = [np.concatenate(part).astype(np.int32) for part in zip(*parts, strict=True)]
        return ScoreWords(
            rows=flat[0], targets=flat[1], entries=flat[2], positions=flat[3], places=places, num_top=flat[4]
        )

    def _prompt_part(self, plan: StepPlan, entry: int, end: int) -> tuple[Any, ...]:
        """A planned row's rows of tokens, targets, entries, positions, likeliest; its tokens end before `end`."""
        seat, start, count = plan.rows[entry], plan.starts[entry], plan.counts[entry]
        tokens = self._tokens[seat]
        num = min(start + count, len(tokens) - 1) - start  # the last token has none after it yet
        rows = trailing(np.array([end]), np.array([count]))[:num]
        positions = np.arange(start + 1, start + num + 1)
        likeliest = np.full(num, self.num_prompt_top_S[seat])
        return rows, tokens[positions], np.full(num, entry), positions, likeliest


def scored(logits_LV: Tensor, tokens_L: Tensor, num_top: int) -> Tensor:
    """Words [L, X] int32 of tokens and the `num_top` likeliest ones."""
    logits_LV = logits_LV.float()
    num_top = min(num_top, logits_LV.shape[1])
    total_L1 = logits_LV.logsumexp(-1, keepdim=True)
    own_L1 = logits_LV.gather(1, tokens_L.clamp(min=0).long()[:, None])
    ranks_L1 = (logits_LV > own_L1).sum(-1, keepdim=True) + 1
    top = logits_LV.topk(num_top)
    floats = [(own_L1 - total_L1).view(torch.int32), (top.values - total_L1).view(torch.int32)]
    return torch.cat([floats[0], ranks_L1.int(), top.indices.int(), floats[1]], dim=1)


def score_step(
    words: ScoreWords,
    rows_M: Tensor,
    targets: Tensor,
    logits: Callable[[Tensor], Tensor],
    sampled: tuple[Tensor, Tensor],
) -> Tensor:
    """Words of all scored tokens of a step, flat int32. `sampled`: logits [L, V] and samples [L].

    `logits`: those of tokens of the batch, for prompts.
    """
    logits_LV, samples_L = sampled
    num_top, num_sampled = int(words.num_top.max()), words.num_sampled
    parts = []
    for at in range(0, num_sampled, MAX_SCORED_ROWS):
        rows = rows_M[at : min(at + MAX_SCORED_ROWS, num_sampled)]
        parts.append(scored(logits_LV[rows], samples_L[rows], num_top).flatten())
    for at in range(0, len(targets), MAX_SCORED_ROWS):
        rows = rows_M[num_sampled + at : num_sampled + at + MAX_SCORED_ROWS]
        parts.append(scored(logits(rows), targets[at : at + MAX_SCORED_ROWS], num_top).flatten())
    return torch.cat(parts)


def logprob_columns(
    plan: StepPlan, words: ScoreWords, packed: Ints, counts: array[int], tokens: array[int]
) -> Logprobs:
    """Unpack what `score_step` gave, without the drafts that did not hold. `counts`, `tokens`: the step's gains."""
    packed_MX = packed.reshape(len(words.rows), -1)
    width = (packed_MX.shape[1] - 2) // 2
    gains = column(counts)
    is_kept = np.ones(len(words.rows), bool)
    sampled = slice(0, words.num_sampled)
    entries = words.entries[sampled]
    is_kept[sampled] = words.places < gains[entries]
    own = np.concatenate([np.zeros(words.num_sampled, np.int32), words.targets])
    flat = np.append(column(tokens), 0)
    own[sampled] = flat[np.where(is_kept[sampled], (np.cumsum(gains) - gains)[entries] + words.places, -1)]
    packed_MX = packed_MX[is_kept]
    num_top = np.minimum(words.num_top[is_kept], width)
    is_top = np.arange(width) < num_top[:, None]
    numbers = column(plan.requests)[words.entries[is_kept]]
    return Logprobs(
        requests=ints_of(numbers),
        positions=ints_of(words.positions[is_kept]),
        tokens=ints_of(own[is_kept]),
        logprobs=floats_of(packed_MX[:, 0]),
        ranks=ints_of(packed_MX[:, 1]),
        offsets=ints_of(np.concatenate([[0], np.cumsum(num_top)])),
        top_tokens=ints_of(packed_MX[:, 2 : 2 + width][is_top]),
        top_logprobs=floats_of(packed_MX[:, 2 + width :][is_top]),
    )


def ints_of(values: Ints) -> array[int]:
    """A column of integers."""
    return array("i", values.astype(np.int32).tobytes())


def floats_of(bits: Ints) -> array[float]:
    """A column of floats, from their bits."""
    return array("f", np.ascontiguousarray(bits).tobytes())
