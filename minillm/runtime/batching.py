"""StepPlan -> int32 words: everything that a step needs from the host, so that it takes a copy, or two.

It knows columns, not tensors: the runner copies the words and `kernels.step_inputs` expands them on the device.

    inputs   | logit rows L | logit seats L | positions L | seats R | starts R | counts R | query starts R |
             | token offsets R | tokens |
    deltas   | block places B | blocks B | seated rows N | parameters 6 N | copies from C | copies to C |

Rows with one token come first, each group in the plan's order. On a GPU a step is padded to one of a few shapes, those
of CUDA graphs, and of eager steps just as well: a decode step by rows of seat 0 with one token, a mixed one by empty
rows and by tokens of no row, the logits of both by the first token of the batch. There a row with drafts becomes rows
of one token each, which share a seat, so that drafts take the kernels of decodes.

    plan  | request 7: token, 3 drafts | request 9: token |        batch  | 7 | 7 | 7 | 7 | 9 |
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minillm.core.plan import StepPlan
from minillm.runtime.rows import Ints, Rows

NUM_ROW_COLUMNS = 5
NUM_SAMPLE_COLUMNS = 3


@dataclass(frozen=True, kw_only=True)
class PaddedShapes:
    """Shapes that steps are padded to, ascending; a step beyond the largest keeps its own."""

    decode_sizes: tuple[int, ...] = ()
    """Rows of a step in which every row computes one token and samples it; rows of logits of any step."""
    draft_sizes: tuple[int, ...] = ()
    """Rows of the same if some are drafts: they share a seat. Empty: rows with drafts stay whole."""
    mixed_sizes: tuple[int, ...] = ()
    """Tokens of any other step."""
    num_rows: int = 0
    """Rows of such a step."""


@dataclass(slots=True, kw_only=True)
class EditWords:
    """What edits of logits (`runtime.edits`) need from the host in a step."""

    sections: tuple[Ints, ...]
    """int32 arrays: seats [n], profiles [n P], known seats, positions and tokens [3 T], step columns [7 K]; the kernels
    (`edits_reference`) have the layout of profiles and columns."""
    num_prompt: int
    """Known tokens in front that are of prompts."""
    num_rows: int
    """Rows of logits that are edited."""
    num_masks: int
    """Masks that the step waits for, in the order of the plan's rows and their samples."""
    masks: Ints | None = None
    """The masks once they have come, [num_masks, vocabulary / 32]."""


@dataclass(slots=True, kw_only=True)
class ScoreWords:
    """Which tokens' logprobs (`runtime.logprobs`) a step reports: sampled ones, then those of prompts."""

    rows: Ints
    """int32: row of logits of each sampled token, then row of the batch's tokens for each prompt's."""
    targets: Ints
    """int32: the prompts' tokens."""
    entries: Ints
    """Planned row of each."""
    positions: Ints
    """Of the token in its request."""
    places: Ints
    """Of a sampled token: which of its planned row's it is."""
    num_top: Ints
    """Likeliest tokens to report for each."""

    @property
    def num_sampled(self) -> int:
        """Sampled tokens, in front."""
        return len(self.places)


@dataclass(slots=True, kw_only=True)
class StepWords:
    """The words of a step in order, and what the host knows about it."""

    samples: Ints
    """int32 [3, L]: token of the batch whose logits are sampled, seat, position of the sampled token."""
    columns: Ints
    """int32 [5, R]."""
    tokens: Ints
    """int32, those that the host knows."""
    deltas: tuple[Ints, ...]
    """int32 arrays: places, blocks, seated rows, parameters, from, to; mostly all are empty."""
    order: Ints
    """Planned row of each row of the batch."""
    num_logits: Ints
    """Rows of logits that are sampled, per row of the batch."""
    num_rows: int
    """Rows of the plan; the three below count those of the batch, padding too."""
    num_tokens: int
    num_decodes: int
    """Rows in front that may have one token; none behind them has."""
    num_samples: int
    """Rows of logits."""
    has_drafts: bool
    """Whether rows in front may share a seat."""
    max_query_len: int
    max_context_len: int
    is_random: bool
    is_filtered: bool
    edits: EditWords | None = None
    """None: no row's logits change."""
    scores: ScoreWords | None = None
    """None: nobody asks for logprobs."""


def step_words(plan: StepPlan, rows: Rows, shapes: PaddedShapes) -> StepWords:
    """Lay a plan out as words, and note its new seats in `rows`' host state."""
    seated_rows, params = rows.seat(plan)
    places, blocks = rows.block_words(plan)
    counts = column(plan.counts)
    parts = draft_parts(plan, shapes)
    order = np.argsort(counts > parts, kind="stable").astype(np.int32)
    counts, parts = counts[order], parts[order]
    num_tokens = column(plan.num_tokens)
    token_offsets = np.where(num_tokens > 0, np.cumsum(num_tokens) - num_tokens, -1)[order]
    ends = np.cumsum(counts, dtype=np.int32)
    starts = column(plan.starts)[order]
    seats = column(plan.rows)[order]
    num_logits = column(plan.num_samples)[order]
    logit_seats, positions = np.repeat(seats, num_logits), trailing(starts + counts + 1, num_logits)
    samples = np.stack([trailing(ends, num_logits), logit_seats, positions]).astype(np.int32)
    copies = column(plan.copies).reshape(-1, 2)
    columns = np.stack([seats, starts, counts, ends - counts, token_offsets]).astype(np.int32)
    tokens = column(plan.tokens)
    is_random, is_filtered = (bool(kind[logit_seats].any()) for kind in (rows.is_random_S, rows.is_filtered_S))
    has_drafts = bool(parts.max() > 1)
    if has_drafts:
        columns = split_rows(columns, parts)
    num_batched, num_decodes = int(ends[-1]), int((columns[2] == 1).sum())
    if num_decodes == num_batched and num_logits.all():
        sizes = shapes.draft_sizes if has_drafts else shapes.decode_sizes
        columns = with_rows(columns, padded_size(num_decodes, sizes), num_decodes, tokens_each=1)
        num_batched = num_decodes = columns.shape[1]
    elif num_batched <= max(shapes.mixed_sizes, default=0):
        columns = with_rows(columns, shapes.num_rows, num_batched, tokens_each=0)
        num_batched, num_decodes = padded_size(num_batched, shapes.mixed_sizes), shapes.num_rows
    if shapes.decode_sizes:
        tokens = with_zeros(tokens, num_batched)
        num_samples = padded_size(samples.shape[1], shapes.decode_sizes) if samples.size else 0
        samples = with_zeros(samples, num_samples)
    return StepWords(
        samples=samples,
        columns=columns,
        tokens=tokens,
        deltas=(places, blocks, seated_rows, params.reshape(-1), copies[:, 0], copies[:, 1]),
        order=order,
        num_logits=num_logits,
        num_rows=len(order),
        num_tokens=num_batched,
        num_decodes=num_decodes,
        num_samples=samples.shape[1],
        has_drafts=has_drafts,
        max_query_len=int(columns[2].max()),
        max_context_len=int((starts + counts).max()),
        is_random=is_random,
        is_filtered=is_filtered,
    )


def draft_parts(plan: StepPlan, shapes: PaddedShapes) -> Ints:
    """Rows of the batch that a planned row becomes: each token one if they are a last token and its drafts."""
    counts, num_samples = column(plan.counts), column(plan.num_samples)
    parts = np.where(counts == num_samples, counts, 1)
    return parts if shapes.draft_sizes and parts.sum() <= shapes.num_rows else np.ones_like(counts)


def split_rows(columns: Ints, parts: Ints) -> Ints:
    """Row columns with parts[i] rows for row i, one for each of its tokens where that is more than one."""
    owners, within = places_of(parts)
    columns = columns[:, owners]
    columns[[1, 3, 4]] += within  # start, first token, offset: 0 for rows that stay whole
    columns[2] -= parts[owners] - 1
    return columns


def column(values: array[int]) -> Ints:
    """An array('i') as a numpy view."""
    return np.asarray(values, np.int32)


def padded_size(num_rows: int, sizes: Sequence[int]) -> int:
    """The smallest of the ascending `sizes` that holds `num_rows`; itself beyond the largest.

    >>> padded_size(3, (1, 2, 4)), padded_size(9, (1, 2, 4))
    (4, 9)
    """
    at = bisect_left(sizes, num_rows)
    return sizes[at] if at < len(sizes) else num_rows


def with_zeros(words: Ints, size: int) -> Ints:
    """`words` [..., n] with zeros behind them, up to `size`."""
    return np.concatenate([words, np.zeros((*words.shape[:-1], max(0, size - words.shape[-1])), np.int32)], axis=-1)


def with_rows(columns: Ints, size: int, first_token: int, *, tokens_each: int) -> Ints:
    """Row columns with rows of seat 0, whose table leads to block 0, behind them, up to `size` rows.

    Such a row has no token, or computes its last one again at position 0; their tokens begin at `first_token`.
    """
    num = max(0, size - columns.shape[1])
    padding = np.zeros((NUM_ROW_COLUMNS, num), np.int32)
    padding[2] = tokens_each
    padding[3] = first_token + np.arange(num) * tokens_each
    padding[4] = -1
    return np.concatenate([columns, padding], axis=1)


def trailing(ends: Ints, counts: Ints) -> Ints:
    """The last counts[i] indices before ends[i], for every i, flat.

    >>> trailing(np.array([3, 9]), np.array([1, 2])).tolist()
    [2, 7, 8]
    """
    owners, within = places_of(counts)
    return ((ends - counts)[owners] + within).astype(np.int32)


def places_of(counts: Ints) -> tuple[Ints, Ints]:
    """For counts[i] things of each i, flat: whose each is, and which of its owner's it is.

    >>> [part.tolist() for part in places_of(np.array([2, 0, 1]))]
    [[0, 0, 2], [0, 1, 0]]
    """
    owners = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    firsts = np.cumsum(counts, dtype=np.int32) - counts
    return owners, np.arange(len(owners), dtype=np.int32) - firsts[owners]
