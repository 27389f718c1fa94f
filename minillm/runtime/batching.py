"""StepPlan -> one flat int32 buffer: everything that a step needs from the host, so that it takes one copy.

It knows columns, not tensors: the runner copies the words and `kernels.step_inputs` expands them on the device.

    | seats R | starts R | counts R | query starts R | token offsets R | tokens | logit rows L | logit seats L |
    | block places B | blocks B | seated rows N | parameters 6 N | copies from C | copies to C |

Rows with one token come first, each group in the plan's order. Where every row computes and samples one token, rows of
seat 0 and token room are added up to one of `decode_sizes`: the shapes of CUDA graphs, and of eager steps just as well.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minillm.core.plan import StepPlan
from minillm.runtime.rows import Ints, Rows

NUM_ROW_COLUMNS = 5


@dataclass(slots=True, kw_only=True)
class StepWords:
    """The sections of a step's buffer in order, and what the host knows about the step."""

    sections: tuple[Ints, ...]
    """int32 arrays: row columns, tokens, logit rows, logit seats, places, blocks, seated rows, parameters, from, to."""
    order: Ints
    """Planned row of each row of the batch."""
    num_logits: Ints
    """Logits per row of the batch."""
    num_rows: int
    """Rows of the batch, padding not counted; the three below count it."""
    num_tokens: int
    num_decodes: int
    num_samples: int
    """Rows of logits."""
    is_decode: bool
    """Whether every row computes one token and samples it: the shapes that are padded."""
    max_query_len: int
    max_context_len: int
    is_random: bool
    is_filtered: bool

    @property
    def size(self) -> int:
        """Words in all."""
        return sum(s.size for s in self.sections)

    def offsets(self) -> Iterator[tuple[int, int]]:
        """Begin and end of each section in the buffer."""
        at = 0
        for section in self.sections:
            yield at, at + section.size
            at += section.size


def step_words(plan: StepPlan, rows: Rows, decode_sizes: Sequence[int] = ()) -> StepWords:
    """Lay a plan out as words, and note its new seats in `rows`' host state."""
    seated_rows, params = rows.seat(plan)
    places, blocks = rows.block_words(plan)
    counts = column(plan.counts)
    is_long = counts > 1
    order = np.argsort(is_long, kind="stable").astype(np.int32)
    counts, is_long = counts[order], is_long[order]
    num_tokens = column(plan.num_tokens)
    token_offsets = np.where(num_tokens > 0, np.cumsum(num_tokens) - num_tokens, -1)[order]
    ends = np.cumsum(counts, dtype=np.int32)
    starts = column(plan.starts)[order]
    seats = column(plan.rows)[order]
    num_logits = column(plan.num_logits)[order]
    logit_seats = np.repeat(seats, num_logits)
    copies = column(plan.copies).reshape(-1, 2)
    columns = np.stack([seats, starts, counts, ends - counts, token_offsets]).astype(np.int32)
    tokens, logit_rows = column(plan.tokens), trailing(ends, num_logits)
    is_decode = bool(not is_long.any() and (num_logits == 1).all())
    num_padding = padded_size(len(order), decode_sizes) - len(order) if is_decode else 0
    if num_padding:
        columns = np.concatenate([columns, padding_columns(len(order), num_padding)], axis=1)
        logit_rows = np.arange(columns.shape[1], dtype=np.int32)
        logit_seats = columns[0]
    if is_decode and decode_sizes:
        tokens = np.concatenate([tokens, np.zeros(columns.shape[1] - len(tokens), np.int32)])
    return StepWords(
        sections=(
            columns.reshape(-1),
            tokens,
            logit_rows,
            logit_seats,
            places,
            blocks,
            seated_rows,
            params.reshape(-1),
            copies[:, 0],
            copies[:, 1],
        ),
        order=order,
        num_logits=num_logits,
        num_rows=len(order),
        num_tokens=int(ends[-1]) + num_padding,
        num_decodes=int(len(order) - is_long.sum()) + num_padding,
        num_samples=len(logit_rows),
        is_decode=is_decode,
        max_query_len=int(counts.max()),
        max_context_len=int((starts + counts).max()),
        is_random=bool(rows.is_random_S[logit_seats].any()),
        is_filtered=bool(rows.is_filtered_S[logit_seats].any()),
    )


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


def padding_columns(num_rows: int, num_padding: int) -> Ints:
    """Row columns of padding: seat 0, whose table leads to block 0, computes its last token again at position 0."""
    columns = np.zeros((NUM_ROW_COLUMNS, num_padding), np.int32)
    columns[2] = 1
    columns[3] = np.arange(num_rows, num_rows + num_padding)
    columns[4] = -1
    return columns


def trailing(ends: Ints, counts: Ints) -> Ints:
    """The last counts[i] indices before ends[i], for every i, flat.

    >>> trailing(np.array([3, 9]), np.array([1, 2])).tolist()
    [2, 7, 8]
    """
    first = np.repeat(ends - counts, counts)
    within = np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)
    return (first + within).astype(np.int32)
