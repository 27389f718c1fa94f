"""CUDA graphs of steps: what takes hundreds of launches from Python replays as two.

The layers are captured once for each padded shape of a step, head and sampling once for each number of logits and kind
of sampling: any of the one goes with any of the other, through hidden states that stay where they are. It knows no
plans: both read a step's inputs where the step buffer has them.

    columns, tokens --> [ layers, this shape ] --hidden states--> [ head and sampling, this kind ] --> samples
                                                  rows, seats, positions --^

Shapes: T tokens, R rows, L rows of logits, D hidden size; padding included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from minillm.runtime.batching import NUM_ROW_COLUMNS, NUM_SAMPLE_COLUMNS, PaddedShapes
from minillm.runtime.step_buffer import StepBuffer

STEP_TOKENS = (64, *range(128, 1280, 128), *range(1280, 2048, 256), *range(2048, 8193, 512))
"""Tokens that mixed steps are padded to. The large ones are graphs too: a kernel of tensor descriptors takes longer to
launch from Python than a layer of 8,192 tokens takes to run."""
DRAFT_ROWS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, *range(256, 8193, 128))
"""Those sizes of a decode step that one with drafts may have, for engines that draft; and the largest."""
SAMPLING_KINDS = ((False, False), (True, False), (True, True))
"""(is_random, is_filtered)."""


class Stages(Protocol):
    """The two parts of a step (the runner has them)."""

    def run_layers(self, columns_5R: Tensor, tokens_T: Tensor, has_drafts: bool = False) -> Tensor:
        """Hidden states [T, D] of a padded step, for rows of any length."""

    def finish(self, x_TD: Tensor, samples_3L: Tensor, kind: tuple[bool, bool]) -> Finished:
        """Head and sampling. `samples_3L`: rows of `x_TD`, their seats, the sampled tokens' positions."""

    def finish_edited(self, finished: Finished, kind: tuple[bool, bool]) -> None:
        """Sample padding again, as if its logits were edited: no graph holds these launches."""

    def finish_scored(self, finished: Finished) -> None:
        """Score padding's samples, as if their logprobs were asked for: these are in no graph either."""


class Finished(NamedTuple):
    """What head and sampling give."""

    samples_L: Tensor
    """int32."""
    logits_LV: Tensor
    """In the model's dtype."""


class FinishGraph(NamedTuple):
    """A captured kind of sampling, and what it writes; its logits lie where another graph may write others."""

    graph: torch.cuda.CUDAGraph
    finished: Finished


class Bytes:
    """Memory of a GPU, as others may take it up (NumPy's protocol for arrays on CUDA devices)."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def borrowed(x: Tensor) -> Tensor:
    """The same memory without a claim to it: graphs of one pool may use it as well once `x` itself is gone."""
    num_elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = torch.as_tensor(Bytes(x.data_ptr(), num_elements * x.element_size()), device=x.device)
    return memory.view(x.dtype).as_strided(x.shape, x.stride())


def padded_shapes(max_num_seqs: int, max_num_batched_tokens: int, is_drafting: bool = False) -> PaddedShapes:
    """Rows of decode steps: 1, 2, 4, then by 8 to 256, by 16 to 512, by 32 on; tokens of mixed ones: up to 8,192.

    With `is_drafting` there are steps of decodes and drafts too.

    >>> padded_shapes(20, 300)
    PaddedShapes(decode_sizes=(1, 2, 4, 8, 16, 24), draft_sizes=(), mixed_sizes=(64, 128, 256, 384), num_rows=25)
    """
    rows = [1, 2, 4, *range(8, 256, 8), *range(256, 512, 16), *range(512, max_num_seqs + 32, 32)]
    decode_sizes = reaching(rows, max_num_seqs)
    # A row more than any decode step has: an odd number, which never is a number of tokens.
    return PaddedShapes(
        decode_sizes=decode_sizes,
        draft_sizes=tuple(size for size in decode_sizes if is_drafting and size in (*DRAFT_ROWS, decode_sizes[-1])),
        mixed_sizes=reaching(STEP_TOKENS, max_num_batched_tokens),
        num_rows=decode_sizes[-1] + 1,
    )


def reaching(sizes: Sequence[int], largest: int) -> tuple[int, ...]:
    """Those of the ascending `sizes` up to the first that is not below `largest`."""
    return tuple(size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] < largest)


def layer_shapes(shapes: PaddedShapes) -> list[tuple[int, int, bool]]:
    """(rows, tokens, has_drafts) of every padded step, the largest first.

    >>> layer_shapes(PaddedShapes(decode_sizes=(1, 2), draft_sizes=(2,), mixed_sizes=(64,), num_rows=3))
    [(3, 64, False), (2, 2, False), (2, 2, True), (1, 1, False)]
    """
    decodes = [(size, size, False) for size in shapes.decode_sizes]
    drafts = [(size, size, True) for size in shapes.draft_sizes]
    mixed = [(shapes.num_rows, size, False) for size in shapes.mixed_sizes]
    return sorted(decodes + drafts + mixed, key=lambda shape: shape[1], reverse=True)


def padding(num_rows: int, num_tokens: int, has_drafts: bool, device: torch.device) -> tuple[Tensor, Tensor, bool]:
    """A step of nothing but padding: rows of seat 0 with one token each, or empty rows and tokens of no row."""
    columns_5R = torch.zeros(NUM_ROW_COLUMNS, num_rows, dtype=torch.int32, device=device)
    if num_rows == num_tokens:
        columns_5R[2] = 1
        columns_5R[3] = torch.arange(num_rows, device=device)
    return columns_5R, torch.zeros(num_tokens, dtype=torch.int32, device=device), has_drafts


@torch.inference_mode()
def run_each_shape(stages: Stages, shapes: PaddedShapes, max_tokens: int, device: torch.device) -> None:
    """Run padding in every padded shape, and in one of `max_tokens`: all kernels that steps launch."""
    x_TD = stages.run_layers(*padding(shapes.num_rows, max_tokens, False, device))
    for size in reversed(shapes.decode_sizes):
        samples_3L = torch.zeros(NUM_SAMPLE_COLUMNS, size, dtype=torch.int32, device=device)
        for kind in SAMPLING_KINDS:
            finished = stages.finish(x_TD, samples_3L, kind)
    for kind in SAMPLING_KINDS:
        stages.finish_edited(finished, kind)
    stages.finish_scored(finished)
    for shape in layer_shapes(shapes):
        stages.run_layers(*padding(*shape, device))


class StepGraphs:
    """Captured steps. All share one pool of memory: one step runs at a time.

    They are captured on a stream of their own. Torch's stream for captures is one for the whole process, on one device,
    and cuBLAS has one workspace for a stream: the graphs of two engines, which may run at once, would share it.
    """

    def __init__(self, stages: Stages, shapes: PaddedShapes, buffer: StepBuffer, device: torch.device) -> None:
        self._buffer, self._device = buffer, device
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        largest_first = layer_shapes(shapes)  # the others fit into its memory
        self._x_TD = torch.empty_like(stages.run_layers(*padding(*largest_first[0], device)))
        self._layers = {shape: self._capture_layers(stages, *shape) for shape in largest_first}
        kinds = [(size, kind) for size in reversed(shapes.decode_sizes) for kind in SAMPLING_KINDS]
        self._finish = {(size, kind): self._capture_finish(stages, size, kind) for size, kind in kinds}

    @property
    def num_captured(self) -> int:
        """Graphs in all."""
        return len(self._layers) + len(self._finish)

    def run_layers(self, num_rows: int, num_tokens: int, has_drafts: bool) -> Tensor | None:
        """Replay the layers of the step in the buffer; None if its shape was not captured."""
        graph = self._layers.get((num_rows, num_tokens, has_drafts and num_rows == num_tokens))
        if graph is None:
            return None
        graph.replay()
        return self._x_TD

    def finish(self, x_TD: Tensor, num_samples: int, kind: tuple[bool, bool]) -> Finished | None:
        """Replay head and sampling on what `run_layers` gave; None if that was not captured.

        Samples and logits are to be read before the next replay.
        """
        captured = self._finish.get((num_samples, kind)) if x_TD is self._x_TD else None
        if captured is None:
            return None
        captured.graph.replay()
        return captured.finished

    def _capture_layers(self, stages: Stages, num_rows: int, num_tokens: int, has_drafts: bool) -> torch.cuda.CUDAGraph:
        inputs = padding(num_rows, num_tokens, has_drafts, self._device)
        _, columns_5R, tokens_T = self._buffer.inputs(0, num_rows, num_tokens)
        columns_5R.copy_(inputs[0])
        tokens_T.copy_(inputs[1])
        stages.run_layers(columns_5R, tokens_T, has_drafts)  # outside a capture: libraries are set up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            self._x_TD[:num_tokens].copy_(stages.run_layers(columns_5R, tokens_T, has_drafts))
        return graph

    def _capture_finish(self, stages: Stages, num_samples: int, kind: tuple[bool, bool]) -> FinishGraph:
        samples_3L = self._buffer.inputs(num_samples, 0, 0).samples_3L.zero_()
        stages.finish(self._x_TD, samples_3L, kind)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            samples_L, logits_LV = stages.finish(self._x_TD, samples_3L, kind)
        # To keep the logits of every graph would take gigabytes. Kept until here, their memory was no other tensor's in
        # this graph; the next one captured may have it.
        return FinishGraph(graph, Finished(samples_L, borrowed(logits_LV)))
