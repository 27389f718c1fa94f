"""CUDA graphs of decode steps: what takes hundreds of launches from Python replays as one.

A step of one token per row depends on its size alone, so it is captured once for each of `decode_sizes`; sampling is a
graph of its own for each kind of work it can be asked for. It knows no plans: the runner copies a step's columns in.

    columns, tokens --copy--> [ forward graph of this size ] --logits--> [ sampling graph of this kind ] --> samples

Shapes: R rows of the size (padding included), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.runtime.batching import NUM_ROW_COLUMNS

SAMPLING_KINDS = ((False, False), (True, False), (True, True))
"""(is_random, is_filtered)."""


class Decoded(NamedTuple):
    """What the forward pass of a decode step gives."""

    positions_R: Tensor
    logits_RV: Tensor


class SizeGraphs(NamedTuple):
    """The graphs of one size, and the tensors that they read and write."""

    columns_5R: Tensor
    tokens_R: Tensor
    forward: torch.cuda.CUDAGraph
    sampling: dict[tuple[bool, bool], tuple[torch.cuda.CUDAGraph, Tensor]]


def decode_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Rows of captured decode steps: 1, 2, 4, then by 8 to 256, by 16 to 512, by 32 to `max_num_seqs`.

    >>> decode_sizes(20)
    (1, 2, 4, 8, 16, 24)
    """
    every = [1, 2, 4, *range(8, 256, 8), *range(256, 512, 16), *range(512, max_num_seqs + 32, 32)]
    return tuple(size for i, size in enumerate(every) if i == 0 or every[i - 1] < max_num_seqs)


class DecodeGraphs:
    """Captured decode steps by size. All share one pool of memory: only one of them runs at a time."""

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor], Decoded],
        sample: Callable[[Decoded, Tensor, bool, bool], Tensor],
        sizes: Iterable[int],
        device: torch.device,
    ) -> None:
        """Captures `forward(columns_5R, tokens_R)` and `sample(decoded, seats_R, is_random, is_filtered)`."""
        self._pool = torch.cuda.graph_pool_handle()
        self._by_size: dict[int, SizeGraphs] = {}
        for size in sorted(sizes, reverse=True):  # the largest first: the others fit into its memory
            self._by_size[size] = self._capture(forward, sample, size, device)

    def holds(self, size: int) -> bool:
        """Whether steps of this size were captured."""
        return size in self._by_size

    def replay(self, columns_5R: Tensor, tokens_R: Tensor, is_random: bool, is_filtered: bool) -> Tensor:
        """Run a decode step of a captured size; its samples [R], to be copied before the next replay."""
        graphs = self._by_size[tokens_R.shape[0]]
        graphs.columns_5R.copy_(columns_5R)
        graphs.tokens_R.copy_(tokens_R)
        graphs.forward.replay()
        graph, samples_R = graphs.sampling[is_random, is_filtered]
        graph.replay()
        return samples_R

    def _capture(
        self,
        forward: Callable[[Tensor, Tensor], Decoded],
        sample: Callable[[Decoded, Tensor, bool, bool], Tensor],
        size: int,
        device: torch.device,
    ) -> SizeGraphs:
        columns_5R = torch.zeros(NUM_ROW_COLUMNS, size, dtype=torch.int32, device=device)
        columns_5R[2] = 1
        columns_5R[3] = torch.arange(size, device=device)
        tokens_R = torch.zeros(size, dtype=torch.int32, device=device)
        # Once outside a capture: kernels are compiled and libraries set up.
        warm = forward(columns_5R, tokens_R)
        for kind in SAMPLING_KINDS:
            sample(warm, columns_5R[0], *kind)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            decoded = forward(columns_5R, tokens_R)
        sampling = {}
        for kind in SAMPLING_KINDS:
            sampling[kind] = (torch.cuda.CUDAGraph(), torch.empty(0))
            with torch.cuda.graph(sampling[kind][0], pool=self._pool):
                samples_R = sample(decoded, columns_5R[0], *kind)
            sampling[kind] = (sampling[kind][0], samples_R)
        return SizeGraphs(columns_5R, tokens_R, graph, sampling)
