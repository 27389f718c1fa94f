"""ForwardBatch: everything that a forward pass reads, as tensors. It knows no requests, plans or policies.

Shapes: T tokens of this step, R rows of this step, S seats in device state,
M blocks a seat can hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(slots=True, kw_only=True)
class ForwardBatch:
    """A step's inputs. Rows with one query token come first; padding may add empty rows behind all others.

    tokens  | d d d | c c c c c c c | c c c c |      d: rows of one token, c: rows of several (chunks)
    rows    | 0 1 2 |       3       |    4    |      query_starts: 0 1 2 3 10 14
    """

    input_ids_T: Tensor
    """int32: token ids."""
    positions_T: Tensor
    """int32: position of each token in its request."""
    slots_T: Tensor
    """int64: block * block_size + offset, where each token's key and value go."""
    query_starts_R1: Tensor
    """int32 [R + 1]: first token of each row."""
    context_lens_R: Tensor
    """int32: tokens in the cache after this step, this step's own included."""
    rows_R: Tensor
    """int32: seat of each row, an index into `block_tables_SM`."""
    block_tables_SM: Tensor
    """int32: resident block tables of all seats (never a gathered copy)."""
    num_decodes: int
    """Rows in front that may have exactly one query token; none behind them has, and those among them that have none or
    several are not decodes."""
    shares_tables: bool = False
    """Whether rows of one token may be of one request: each attends to those before it in the same step."""
    max_query_len: int
    """Upper bound of query tokens per row, known on the host."""
    max_context_len: int
    """Upper bound of `context_lens_R`, known on the host."""
    shared: dict[str, Any] = field(default_factory=dict)
    """What the kernel set computed once for all layers, as arguments of its kernels; see `prepare_step`."""
    attention: Callable[..., Tensor] | None = None
    """What attends in place of the kernel set's `attention`, with its arguments; None: that of the kernel set."""
