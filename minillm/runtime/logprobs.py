"""Logprobs of sampled tokens and of prompts' tokens, with the likeliest tokens beside them. It knows no requests.

The device packs each scored token into 32-bit words (`kernels.scores_reference` has their layout), which follow the
step's samples to the host:

    | samples | words of a sampled token | of another | ... | words of a prompt's token | ... |

Shapes: R rows of the batch, E of them whose samples are scored, L rows of logits, V vocabulary, M scored tokens, X
words of one: two, and two for each likeliest token of the row that asks for most.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from minillm.core.plan import Logprobs, StepPlan
from minillm.runtime.batching import ScoreWords, column, places_of, trailing
from minillm.runtime.rows import Ints

NOTHING = np.zeros(0, np.int32)
MAX_PROMPT_ROWS = 64
"""Rows of a prompt's logits at once: all of them would fill the memory."""


class LogprobRows:
    """Who asks for logprobs, by seat; host state alone."""

    def __init__(self, num_seats: int) -> None:
        self.num_top_S = np.full(num_seats, -1, np.int32)
        self.num_prompt_top_S = np.full(num_seats, -1, np.int32)
        self._tokens: dict[int, Ints] = {}
        self._is_asked = False

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
        if plan.seats:
            self._is_asked = bool(max(self.num_top_S.max(), self.num_prompt_top_S.max()) >= 0)
        if not self._is_asked:
            return None
        rows_R, num_R = column(plan.rows)[order], column(plan.num_samples)[order]
        num_top_R = self.num_top_S[rows_R]
        # Few rows ask: past this line, what costs is the number of operations.
        at_E = np.flatnonzero((num_top_R >= 0) & (num_R > 0))
        owners, places = places_of(num_R[at_E])
        at_M = at_E[owners]
        entries, num_M = order[at_M], num_R[at_M]
        rows = num_R.cumsum()[at_M] - num_M + places
        positions = column(plan.starts)[entries] + column(plan.counts)[entries] - num_M + 1 + places
        columns, targets = np.array([rows, entries, positions, num_top_R[at_M]], np.int32), NOTHING
        if self.num_prompt_top_S.max() >= 0:
            is_prompt = (column(plan.num_logits)[order] > num_R) & (self.num_prompt_top_S[rows_R] >= 0)
            ends = np.cumsum(column(plan.counts)[order])
            for row in np.flatnonzero(is_prompt):
                part, own = self._prompt_part(plan, int(order[row]), int(ends[row]))
                columns, targets = np.concatenate([columns, part], axis=1), np.concatenate([targets, own])
        if not columns.size:
            return None
        rows, entries, positions, num_top = columns.astype(np.int32, copy=False)
        return ScoreWords(
            rows=rows, targets=targets, entries=entries, positions=positions, places=places, num_top=num_top
        )

    def _prompt_part(self, plan: StepPlan, entry: int, end: int) -> tuple[Ints, Ints]:
        """A planned row's rows of tokens, entry, positions, likeliest [4, n], and targets; its tokens end at `end`."""
        seat, start, count = plan.rows[entry], plan.starts[entry], plan.counts[entry]
        tokens = self._tokens[seat]
        num = min(start + count, len(tokens) - 1) - start  # the last token has none after it yet
        rows = trailing(np.array([end]), np.array([count]))[:num]
        positions = np.arange(start + 1, start + num + 1)
        likeliest = np.full(num, self.num_prompt_top_S[seat])
        return np.stack([rows, np.full(num, entry), positions, likeliest]), tokens[positions]


def score_step(
    ops: ModuleType,
    words: ScoreWords,
    rows_M: Tensor,
    targets: Tensor,
    logits: Callable[[Tensor], Tensor],
    sampled: tuple[Tensor, Tensor],
) -> Tensor:
    """A step's samples, then words of all its scored tokens, flat int32. `sampled`: logits [L, V] and samples [L].

    `logits`: those of tokens of the batch, for prompts.
    """
    logits_LV, samples_L = sampled
    num_top, num_sampled = int(words.num_top.max()), words.num_sampled
    parts = [samples_L]
    if num_sampled:
        parts.append(ops.score_tokens(logits_LV, samples_L, rows_M[:num_sampled], num_top).view(-1))
    for at in range(0, len(targets), MAX_PROMPT_ROWS):
        part_LV = logits(rows_M[num_sampled + at :][:MAX_PROMPT_ROWS])
        rows = torch.arange(len(part_LV), dtype=torch.int32, device=rows_M.device)
        parts.append(ops.score_tokens(part_LV, targets[at:], rows, num_top).view(-1))
    return torch.cat(parts)


def logprob_columns(
    plan: StepPlan, words: ScoreWords, packed: Ints, counts: array[int], tokens: array[int]
) -> Logprobs:
    """Unpack what `score_step` gave, without the drafts that did not hold. `counts`, `tokens`: the step's gains."""
    packed_MX = packed.reshape(len(words.rows), -1)
    width = (packed_MX.shape[1] - 2) // 2
    gains = column(counts)
    entries, places = words.entries[: words.num_sampled], words.places
    gains_M = gains[entries]
    is_held = places < gains_M
    held = (gains.cumsum()[entries] - gains_M + places)[is_held]
    own = np.concatenate([column(tokens)[held], words.targets])
    is_kept = np.ones(len(words.rows), bool)
    is_kept[: words.num_sampled] = is_held
    packed_MX = packed_MX[is_kept]
    num_top = np.minimum(words.num_top[is_kept], width)
    is_top = np.arange(width) < num_top[:, None]
    numbers = column(plan.requests)[words.entries[is_kept]]
    return Logprobs(
        requests=ints_of(numbers),
        positions=ints_of(words.positions[is_kept]),
        tokens=ints_of(own),
        logprobs=floats_of(packed_MX[:, 0]),
        ranks=ints_of(packed_MX[:, 1 + width] + 1),
        offsets=array("i", [0, *num_top.cumsum().tolist()]),
        top_tokens=ints_of(packed_MX[:, 2 + width :][is_top]),
        top_logprobs=floats_of(packed_MX[:, 1 : 1 + width][is_top]),
    )


def ints_of(values: Ints) -> array[int]:
    """A column of integers."""
    return array("i", values.astype(np.int32, copy=False).tobytes())


def floats_of(bits: Ints) -> array[float]:
    """A column of floats, from their bits."""
    return array("f", np.ascontiguousarray(bits).tobytes())
