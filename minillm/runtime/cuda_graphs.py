"""CUDA graphs of steps: what takes hundreds of launches from Python replays as two.

The layers are captured once for each padded shape of a step, head and sampling once for each number of logits and kind
of sampling: any of the one goes with any of the other, through hidden states that stay where they are. It knows no
plans: the runner copies a step's columns in.

    columns, tokens --copy--> [ layers, this shape ] --hidden states--> [ head and sampling, this kind ] --> samples

Shapes: T tokens, R rows, L rows of logits, D hidden size; padding included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from minillm.runtime.batching import NUM_ROW_COLUMNS, PaddedShapes

STEP_TOKENS = (64, *range(128, 1024, 128), *range(1024, 2048, 256), *range(2048, 8193, 512))
"""Tokens that mixed steps are padded to. The large ones are graphs too: a kernel of tensor descriptors takes longer to
launch from Python than a layer of 8,192 tokens takes to run."""
DRAFT_TOKENS = (8, 16, 32)
"""Sizes of small mixed steps, for engines that draft."""
SAMPLING_KINDS = ((False, False), (True, False), (True, True))
"""(is_random, is_filtered)."""


class Hidden(NamedTuple):
    """What the layers give: x_TD is still to be added to residual_TD."""

    x_TD: Tensor
    residual_TD: Tensor
    positions_T: Tensor


class Stages(Protocol):
    """The two parts of a step (the runner has them)."""

    def run_layers(self, columns_5R: Tensor, tokens_T: Tensor) -> Hidden:
        """A padded step up to the head, for rows of any length."""

    def finish(self, hidden: Hidden, rows_L: Tensor, seats_L: Tensor, kind: tuple[bool, bool]) -> Tensor:
        """Samples [L] of tokens `rows_L`."""

    def finish_edited(self, seats_K: Tensor, kind: tuple[bool, bool]) -> Tensor:
        """Samples [K] of padding whose logits are edited: no graph holds these launches."""


class LayersGraph(NamedTuple):
    """A captured shape and the tensors that it reads."""

    graph: torch.cuda.CUDAGraph
    columns_5R: Tensor
    tokens_T: Tensor


class FinishGraph(NamedTuple):
    """A captured kind of sampling, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    rows_L: Tensor
    seats_L: Tensor
    samples_L: Tensor


def padded_shapes(max_num_seqs: int, max_num_batched_tokens: int, is_drafting: bool = False) -> PaddedShapes:
    """Rows of decode steps: 1, 2, 4, then by 8 to 256, by 16 to 512, by 32 on; tokens of mixed ones: up to 8,192.

    With `is_drafting` there are mixed steps of fewer tokens too: a row or two and their drafts.

    >>> padded_shapes(20, 300)
    PaddedShapes(decode_sizes=(1, 2, 4, 8, 16, 24), mixed_sizes=(64, 128, 256, 384), num_rows=25)
    """
    rows = [1, 2, 4, *range(8, 256, 8), *range(256, 512, 16), *range(512, max_num_seqs + 32, 32)]
    decode_sizes = reaching(rows, max_num_seqs)
    # A row more than any decode step has: an odd number, which never is a number of tokens.
    return PaddedShapes(
        decode_sizes=decode_sizes,
        mixed_sizes=reaching([*(DRAFT_TOKENS if is_drafting else ()), *STEP_TOKENS], max_num_batched_tokens),
        num_rows=decode_sizes[-1] + 1,
    )


def reaching(sizes: Sequence[int], largest: int) -> tuple[int, ...]:
    """Those of the ascending `sizes` up to the first that is not below `largest`."""
    return tuple(size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < largest)


def layer_shapes(shapes: PaddedShapes) -> list[tuple[int, int]]:
    """(rows, tokens) of every padded step, the largest first.

    >>> layer_shapes(PaddedShapes(decode_sizes=(1, 2), mixed_sizes=(64,), num_rows=3))
    [(3, 64), (2, 2), (1, 1)]
    """
    decodes = [(size, size) for size in shapes.decode_sizes]
    mixed = [(shapes.num_rows, size) for size in shapes.mixed_sizes]
    return sorted(decodes + mixed, key=lambda shape: shape[1], reverse=True)


def padding(num_rows: int, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A step of nothing but padding: rows of seat 0 with one token each, or empty rows and tokens of no row."""
    columns_5R = torch.zeros(NUM_ROW_COLUMNS, num_rows, dtype=torch.int32, device=device)
    if num_rows == num_tokens:
        columns_5R[2] = 1
        columns_5R[3] = torch.arange(num_rows, device=device)
    return columns_5R, torch.zeros(num_tokens, dtype=torch.int32, device=device)


@torch.inference_mode()
def run_each_shape(stages: Stages, shapes: PaddedShapes, max_tokens: int, device: torch.device) -> None:
    """Run padding in every padded shape, and in one of `max_tokens`: all kernels that steps launch."""
    hidden = stages.run_layers(*padding(shapes.num_rows, max_tokens, device))
    for size in reversed(shapes.decode_sizes):
        for kind in SAMPLING_KINDS:
            rows_L, seats_L = torch.zeros(2, size, dtype=torch.int32, device=device)
            stages.finish(hidden, rows_L, seats_L, kind)
    for kind in SAMPLING_KINDS:
        stages.finish_edited(seats_L, kind)
    for shape in layer_shapes(shapes):
        stages.run_layers(*padding(*shape, device))


class StepGraphs:
    """Captured steps. All share one pool of memory: one step runs at a time."""

    def __init__(self, stages: Stages, shapes: PaddedShapes, device: torch.device) -> None:
        self._stages, self._device = stages, device
        self._pool = torch.cuda.graph_pool_handle()
        largest_first = layer_shapes(shapes)  # the others fit into its memory
        warm = stages.run_layers(*padding(*largest_first[0], device))
        self._hidden = Hidden(*(torch.empty_like(part) for part in warm))
        self._layers = {shape: self._capture_layers(*shape) for shape in largest_first}
        sizes = reversed(shapes.decode_sizes)
        self._finish = {(size, kind): self._capture_finish(size, kind) for size in sizes for kind in SAMPLING_KINDS}

    @property
    def num_captured(self) -> int:
        """Graphs in all."""
        return len(self._layers) + len(self._finish)

    def run_layers(self, columns_5R: Tensor, tokens_T: Tensor) -> Hidden | None:
        """Replay the layers of a step; None if its shape was not captured."""
        captured = self._layers.get((columns_5R.shape[1], tokens_T.shape[0]))
        if captured is None:
            return None
        captured.columns_5R.copy_(columns_5R)
        captured.tokens_T.copy_(tokens_T)
        captured.graph.replay()
        return self._hidden

    def finish(self, hidden: Hidden, rows_L: Tensor, seats_L: Tensor, kind: tuple[bool, bool]) -> Tensor | None:
        """Replay head and sampling on what `run_layers` gave; None if that was not captured.

        The samples are to be copied before the next replay.
        """
        captured = self._finish.get((rows_L.shape[0], kind)) if hidden is self._hidden else None
        if captured is None:
            return None
        captured.rows_L.copy_(rows_L)
        captured.seats_L.copy_(seats_L)
        captured.graph.replay()
        return captured.samples_L

    def _capture_layers(self, num_rows: int, num_tokens: int) -> LayersGraph:
        inputs = padding(num_rows, num_tokens, self._device)
        self._stages.run_layers(*inputs)  # outside a capture: libraries are set up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            for kept, part in zip(self._hidden, self._stages.run_layers(*inputs), strict=True):
                kept[:num_tokens].copy_(part)
        return LayersGraph(graph, *inputs)

    def _capture_finish(self, num_logits: int, kind: tuple[bool, bool]) -> FinishGraph:
        rows_L, seats_L = torch.zeros(2, num_logits, dtype=torch.int32, device=self._device)
        self._stages.finish(self._hidden, rows_L, seats_L, kind)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            samples_L = self._stages.finish(self._hidden, rows_L, seats_L, kind)
        return FinishGraph(graph, rows_L, seats_L, samples_L)
