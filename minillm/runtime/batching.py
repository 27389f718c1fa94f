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
from itertools import accumulate, chain, compress

import numpy as np

from minillm.core.plan import StepPlan
from minillm.runtime.rows import FILTERED, RANDOM, Ints, Rows

NUM_ROW_COLUMNS = 5
NUM_SAMPLE_COLUMNS = 3


@dataclass(frozen=True, kw_only=True)
class PaddedShapes:
    """Shapes that steps are padded to, ascending; a step beyond the largest keeps its own number of tokens."""

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

    inputs: Ints
    """int32, flat: the three below, which are views of it."""
    samples: Ints
    """int32 [3, L]: token of the batch whose logits are sampled, seat, position of the sampled token."""
    columns: Ints
    """int32 [5, R]."""
    tokens: Ints
    """int32, those that the host knows."""
    deltas: tuple[Ints, ...]
    """int32 arrays: places, blocks, seated rows, parameters, from, to; mostly all are empty."""
    order: Ints
    """Planned row of each row of the batch, drafts that became rows aside."""
    num_tokens: int
    """Of the batch, padding too."""
    num_decodes: int
    """Rows in front that may have one token; none behind them has."""
    has_drafts: bool
    """Whether rows in front may share a seat."""
    is_random: bool
    is_filtered: bool
    edits: EditWords | None = None
    """None: no row's logits change."""
    scores: ScoreWords | None = None
    """None: nobody asks for logprobs."""

    @property
    def num_samples(self) -> int:
        """Rows of logits."""
        num: int = self.samples.shape[1]
        return num

    @property
    def max_query_len(self) -> int:
        """Tokens of the longest row."""
        return int(self.columns[2].max())

    @property
    def max_context_len(self) -> int:
        """Tokens of the longest row, with those computed before."""
        return int((self.columns[1] + self.columns[2]).max())


def step_words(plan: StepPlan, rows: Rows, shapes: PaddedShapes) -> StepWords:
    """Lay a plan out as words, and note its new seats in `rows`' host state.

    The device waits for this where rows have drafts. For few rows a call of numpy costs more than what it does.
    """
    deltas = rows.delta_words(plan)
    parts = draft_parts(plan, shapes)
    laid, order = row_columns(plan, parts)
    num_rows, num_batched, num_sampled = laid.shape[1], sum(plan.counts), sum(plan.num_samples)
    has_drafts = parts is not None
    is_decode = num_rows == num_batched == num_sampled
    if is_decode:
        num_padded = padded_size(num_rows, shapes.draft_sizes if has_drafts else shapes.decode_sizes)
        num_tokens = num_decodes = num_padded
    elif shapes.mixed_sizes:
        num_padded = num_decodes = shapes.num_rows
        num_tokens = padded_size(num_batched, shapes.mixed_sizes)
    else:
        num_padded, num_decodes, num_tokens = num_rows, int((laid[2] == 1).sum()), num_batched
    num_samples, num_known = num_sampled, len(plan.tokens)
    if shapes.decode_sizes:
        num_samples, num_known = num_sampled and padded_size(num_sampled, shapes.decode_sizes), num_tokens
    sizes = NUM_SAMPLE_COLUMNS * num_samples, NUM_ROW_COLUMNS * num_padded
    inputs = np.zeros(sum(sizes) + num_known, np.int32)
    samples = inputs[: sizes[0]].reshape(NUM_SAMPLE_COLUMNS, num_samples)
    columns = inputs[sizes[0] : sum(sizes)].reshape(NUM_ROW_COLUMNS, num_padded)
    tokens = inputs[sum(sizes) :]
    lay_samples(samples[:, :num_sampled], laid, is_decode)
    columns[:, :num_rows] = laid[:NUM_ROW_COLUMNS]
    if num_rows < num_padded:
        pad_rows(columns[:, num_rows:], num_batched, tokens_each=int(is_decode))
    tokens[: len(plan.tokens)] = column(plan.tokens)
    kind = max(map(rows.kinds.__getitem__, compress(plan.rows, plan.num_samples)), default=0)
    return StepWords(
        inputs=inputs,
        samples=samples,
        columns=columns,
        tokens=tokens,
        deltas=deltas,
        order=order,
        num_tokens=num_tokens,
        num_decodes=num_decodes,
        has_drafts=has_drafts,
        is_random=kind >= RANDOM,
        is_filtered=kind >= FILTERED,
    )


def draft_parts(plan: StepPlan, shapes: PaddedShapes) -> list[int] | None:
    """Rows of the batch that a planned row becomes: each token one if they are a last token and its drafts.

    None if each stays one row.
    """
    counts = plan.counts
    if not shapes.draft_sizes or max(counts) == 1:
        return None
    parts = [count if count == num else 1 for count, num in zip(counts, plan.num_samples, strict=True)]
    return parts if len(parts) < sum(parts) <= shapes.num_rows else None


def row_columns(plan: StepPlan, parts: list[int] | None) -> tuple[Ints, Ints]:
    """Columns [6, R] of the batch's rows, the sixth how many of their tokens are sampled; the planned rows' order."""
    counts, num_samples = plan.counts, plan.num_samples
    if parts is not None:
        counts, num_samples = less(counts, parts), less(num_samples, parts)
    firsts, offsets = sums_before(plan.counts), sums_before(plan.num_tokens)
    flat = bytearray().join((plan.rows, plan.starts, counts, firsts, offsets, num_samples))
    laid = np.frombuffer(flat, np.int32).reshape(NUM_ROW_COLUMNS + 1, -1)
    if 0 in plan.num_tokens:
        laid[4, column(plan.num_tokens) == 0] = -1
    order = np.arange(len(counts), dtype=np.int32)
    is_ordered = len(counts) == 1 or max(counts) == 1
    if not is_ordered:
        order = (laid[2] > 1).argsort(kind="stable").astype(np.int32)
        laid = laid[:, order]
        parts = parts and [parts[i] for i in order.tolist()]
    if parts is not None:
        within = np.fromiter(chain.from_iterable(map(range, parts)), np.int32)
        laid = laid.repeat(parts, axis=1)
        laid[1] += within  # start; then first token and offset
        laid[3:5] += within
    if not is_ordered:
        laid[3] = laid[2].cumsum() - laid[2]
    return laid, order


def less(counts: array[int], parts: list[int]) -> array[int]:
    """Of each row's `counts` tokens those that each of its parts has: one, or all."""
    return array("i", [count - part + 1 for count, part in zip(counts, parts, strict=True)])


def sums_before(counts: array[int]) -> array[int]:
    """Where counts[i] things begin, laid end to end.

    >>> sums_before(array("i", [3, 1, 2]))
    array('i', [0, 3, 4])
    """
    return array("i", accumulate(counts, initial=0))[:-1]


def lay_samples(samples: Ints, laid: Ints, is_decode: bool) -> None:
    """Note what is sampled of rows; `is_decode`: each of them, which has one token."""
    seats, starts, counts, firsts, _, num_samples = laid
    if is_decode:
        samples[0], samples[1], samples[2] = firsts, seats, starts + 1
    else:
        owners, within = places_of(num_samples)
        within += (counts - num_samples)[owners]
        samples[0], samples[1], samples[2] = firsts[owners] + within, seats[owners], starts[owners] + within + 1


def pad_rows(columns: Ints, first_token: int, *, tokens_each: int) -> None:
    """Let rows of zeros be padding: of seat 0, whose table leads to block 0.

    Such a row has no token, or computes its last one again at position 0; their tokens begin at `first_token`.
    """
    columns[2] = tokens_each
    columns[3] = np.arange(columns.shape[1]) * tokens_each + first_token
    columns[4] = -1


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
    owners = np.arange(len(counts), dtype=np.int32).repeat(counts)
    firsts = counts.cumsum(dtype=np.int32) - counts
    return owners, np.arange(len(owners), dtype=np.int32) - firsts[owners]
