"""Where a step's inputs lie on the device: at addresses that CUDA graphs can hold, sent there by one copy.

Samples end where columns begin, so L alone says where they lie, and R alone where tokens do. It knows words and sizes,
not what they mean.

    | ...... | samples 3 L | columns 5 R | tokens T | ... |
                           ^ the same place in every step

Shapes: L rows of logits, R rows, T tokens, padding included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minillm.runtime.batching import NUM_ROW_COLUMNS, NUM_SAMPLE_COLUMNS, PaddedShapes, StepWords
from minillm.runtime.rows import Ints

ALIGNMENT = 4  # words: kernels are compiled for addresses of 16 bytes


class DeviceWords(NamedTuple):
    """A step's words on the device, int32."""

    samples_3L: Tensor
    columns_5R: Tensor
    tokens_T: Tensor


class StepBuffer:
    """Memory for the inputs of one step of any padded shape; a step beyond them gets memory of its own."""

    def __init__(self, shapes: PaddedShapes, device: torch.device) -> None:
        self._num_tokens = max((*shapes.mixed_sizes, *shapes.decode_sizes), default=0)
        self._num_rows, self._device = shapes.num_rows, device
        self._middle = -(-NUM_SAMPLE_COLUMNS * self._num_tokens // ALIGNMENT) * ALIGNMENT
        size = self._middle + NUM_ROW_COLUMNS * shapes.num_rows + self._num_tokens
        self._words = torch.zeros(size, dtype=torch.int32, device=device)
        self._places: dict[tuple[int, int, int], tuple[Tensor, DeviceWords]] = {}

    def inputs(self, num_samples: int, num_rows: int, num_tokens: int) -> DeviceWords:
        """Where the inputs of a step of this shape lie."""
        return self._place(num_samples, num_rows, num_tokens)[1]

    def send(self, words: StepWords) -> DeviceWords:
        """Copy a step's inputs there."""
        num_samples, num_rows, num_tokens = words.num_samples, words.columns.shape[1], len(words.tokens)
        host = on_host((words.inputs,), self._device)
        if num_tokens > self._num_tokens or num_rows > self._num_rows or num_samples > self._num_tokens:
            return split(host.to(self._device, non_blocking=True), num_samples, num_rows)
        flat, sent = self._place(num_samples, num_rows, num_tokens)
        flat.copy_(host, non_blocking=True)
        return sent

    def _place(self, num_samples: int, num_rows: int, num_tokens: int) -> tuple[Tensor, DeviceWords]:
        """The place of a shape, flat and split; kept, as a view takes longer to make than a few words to copy."""
        shape = num_samples, num_rows, num_tokens
        if shape not in self._places:
            begin = self._middle - NUM_SAMPLE_COLUMNS * num_samples
            flat = self._words[begin : self._middle + NUM_ROW_COLUMNS * num_rows + num_tokens]
            self._places[shape] = flat, split(flat, num_samples, num_rows)
        return self._places[shape]


def split(words: Tensor, num_samples: int, num_rows: int) -> DeviceWords:
    """A step's inputs out of its words."""
    shapes = (NUM_SAMPLE_COLUMNS, num_samples), (NUM_ROW_COLUMNS, num_rows)
    sizes = [rows * size for rows, size in shapes]
    samples, columns, tokens_T = words.split([*sizes, len(words) - sum(sizes)])
    return DeviceWords(samples.view(shapes[0]), columns.view(shapes[1]), tokens_T)


def on_host(sections: Sequence[Ints], device: torch.device) -> Tensor:
    """int32 arrays end to end, in memory that `device` can copy from while the host goes on."""
    host = torch.empty(sum(section.size for section in sections), dtype=torch.int32, pin_memory=device.type == "cuda")
    np.concatenate([section.reshape(-1) for section in sections], out=host.numpy())
    return host


def to_device(sections: Sequence[Ints], device: torch.device) -> list[Tensor]:
    """int32 arrays as tensors on the device, by one copy."""
    sizes = [section.size for section in sections]
    return list(on_host(sections, device).to(device, non_blocking=True).split(sizes))
