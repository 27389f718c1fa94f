"""The likeliest tokens, found part by part."""

from __future__ import annotations

import pytest
import torch

from minillm.runtime.logprobs import NUM_PARTS, likeliest


@pytest.mark.parametrize("num_tokens", [NUM_PARTS, 100, 8 * NUM_PARTS, 3001, 768 * NUM_PARTS])
@pytest.mark.parametrize("num_top", [0, 1, 8, 20])
def test_parts_have_the_likeliest_tokens_of_all(num_tokens: int, num_top: int) -> None:
    logits_LV = torch.randn(5, num_tokens, generator=torch.Generator().manual_seed(num_tokens))
    logits_LV[1, :30] += 100  # all in one part, where it holds so many
    logits_LV[2, -1] = torch.inf
    assert torch.equal(likeliest(logits_LV, num_top), logits_LV.topk(num_top).indices)
