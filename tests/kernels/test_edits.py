"""Penalties and masks: transformers' and OpenAI's formulas, drafts before a position count, Triton equals torch.

Triton runs in its interpreter where there is no GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minillm.kernels import edits
from minillm.kernels import sampling_reference as oracle


def arguments(num: int, vocab_size: int, seed: int, *, num_drafts: int = 0) -> dict[str, Any]:
    """Random rows of random seats: most tokens new, some in the prompt, some in the output, some in both."""
    draw = torch.Generator().manual_seed(seed)
    counts_SV = torch.randint(0, 6, (num + 3, vocab_size), generator=draw)
    is_new = torch.rand(num + 3, vocab_size, generator=draw) < 0.7
    penalties_K3 = torch.rand(num, 3, generator=draw) * 2 + 0.1
    num_words = -(-vocab_size // 32)
    return {
        "seats_K": torch.randperm(num + 3, generator=draw)[:num].int(),
        "counts_SV": torch.where(is_new, 0, counts_SV).int(),
        "drafts_KD": torch.randint(-1, vocab_size, (num, num_drafts), generator=draw).int(),
        "penalties_K3": penalties_K3,
        "mask_KW": torch.randint(-(2**31), 2**31 - 1, (num, num_words), generator=draw).int(),
    }


def test_formulas_equal_those_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    vocab_size = 50
    prompt, output, drafts = [3, 7, 7, 9], [7, 11, 11, 11], [12, 11]
    counts_SV = torch.zeros(2, vocab_size, dtype=torch.int32)
    counts_SV[1, prompt] = 1
    for token in output:
        counts_SV[1, token] += 2
    logits_KV = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(0))
    scores_KV = logits_KV.clone()
    oracle.edit_scores(
        scores_KV,
        seats_K=torch.tensor([1]),
        counts_SV=counts_SV,
        drafts_KD=torch.tensor([[12, -1, 11]]),
        penalties_K3=torch.tensor([[1.3, 0.4, 0.25]]),
        mask_KW=torch.full((1, 2), -1, dtype=torch.int32),
    )
    seen = torch.tensor([prompt + output + drafts])
    expected_KV = RepetitionPenaltyLogitsProcessor(1.3)(seen, logits_KV.clone())
    for token in {*output, *drafts}:  # platform.openai.com, "Frequency and presence penalties"
        expected_KV[0, token] -= 0.4 + 0.25 * (output + drafts).count(token)
    torch.testing.assert_close(scores_KV, expected_KV)


def test_a_mask_leaves_out_what_its_bits_leave_out() -> None:
    scores_KV = torch.zeros(1, 70)
    allowed = [0, 31, 32, 63, 69]
    words = [sum(1 << (t % 32) for t in allowed if t // 32 == w) for w in range(3)]
    oracle.edit_scores(
        scores_KV,
        seats_K=torch.tensor([0]),
        counts_SV=torch.zeros(1, 70, dtype=torch.int32),
        drafts_KD=torch.zeros(1, 0, dtype=torch.int32),
        penalties_K3=torch.tensor([[1.0, 0.0, 0.0]]),
        mask_KW=torch.tensor([words], dtype=torch.int64).to(torch.int32),
    )
    assert scores_KV[0].isfinite().nonzero().flatten().tolist() == allowed


@pytest.mark.parametrize(("num", "vocab_size", "num_drafts"), [(1, 33, 0), (3, 5000, 2), (5, 4096, 8)])
def test_triton_equals_torch(device, num: int, vocab_size: int, num_drafts: int) -> None:
    given = arguments(num, vocab_size, 5, num_drafts=num_drafts)
    logits_KV = torch.randn(num, vocab_size, generator=torch.Generator().manual_seed(1)) * 8
    logits_KV[:, 1] = float("-inf")
    expected_KV = logits_KV.clone()
    oracle.edit_scores(expected_KV, **given)
    scores_KV = logits_KV.clone().to(device)
    edits.edit_scores(scores_KV, **{name: x.to(device) for name, x in given.items()})
    assert torch.equal(scores_KV.cpu(), expected_KV)
    assert not torch.equal(expected_KV, logits_KV)


@pytest.mark.gpu
def test_full_size_on_a_gpu_equals_torch() -> None:
    num, vocab_size = 256, 151_936
    given = {name: x.cuda() for name, x in arguments(num, vocab_size, 2, num_drafts=3).items()}
    logits_KV = torch.randn(num, vocab_size, device="cuda") * 8
    expected_KV = logits_KV.clone()
    oracle.edit_scores(expected_KV, **given)
    edits.edit_scores(logits_KV, **given)
    assert torch.equal(logits_KV, expected_KV)
