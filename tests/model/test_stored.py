"""Stored 4-bit codes against the gguf library's expansion of the same blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from minillm.model.stored import CODE_GROUP, DENSE, Shard, StoredTensor


def stored(format: str, num_rows: int = 6, num_columns: int = 96) -> StoredTensor:
    numbers = np.random.default_rng(0).normal(size=(num_rows, num_columns)).astype(np.float32)
    return StoredTensor("x", format, numbers.shape, quantize(numbers, GGMLQuantizationType[format]))


@pytest.mark.parametrize("format", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("rows", [None, Shard(2, 3, 6)])
def test_codes_lose_nothing(format, rows) -> None:
    tensor = stored(format)
    codes = tensor.four_bit(rows)
    assert codes is not None and codes.codes_OE.dtype == torch.uint8 and int(codes.codes_OE.max()) <= 15
    groups = codes.codes_OE.view(len(codes.codes_OE), -1, CODE_GROUP).double()
    numbers = (groups - 8) * codes.scales_OG.double()[..., None] + codes.zeros_OG.double()[..., None]
    expected = tensor.dense(rows)
    got = numbers.view(len(expected), -1, expected.shape[1]).sum(1)
    torch.testing.assert_close(got.float(), expected, rtol=1e-6, atol=1e-6)


def test_other_types_have_no_codes() -> None:
    assert stored("Q5_1").four_bit() is None
    assert StoredTensor("x", DENSE, (2, 32), torch.zeros(2, 32)).four_bit() is None
