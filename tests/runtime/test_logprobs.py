"""A step's scored tokens are packed behind its samples: sampled ones, then prompts', whose logits come in parts."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from minillm.kernels import cpu, gpu
from minillm.runtime.batching import ScoreWords
from minillm.runtime.logprobs import MAX_PROMPT_ROWS, score_step


@pytest.mark.parametrize("ops", [cpu, gpu])
@pytest.mark.parametrize(("num_sampled", "num_prompt"), [(3, 0), (0, 5), (2, 2 * MAX_PROMPT_ROWS + 7)])
def test_words_lie_behind_the_samples(ops: ModuleType, num_sampled: int, num_prompt: int) -> None:
    device = torch.device("cuda" if ops is gpu and torch.cuda.is_available() else "cpu")
    draw = torch.Generator().manual_seed(num_prompt)
    sampled_LV, of_batch_TV = torch.randn(4, 300, generator=draw), torch.randn(200, 300, generator=draw)
    samples_L = torch.tensor([7, 299, 0, 8], dtype=torch.int32)
    rows = torch.cat([torch.arange(4).flip(0)[:num_sampled], torch.randperm(200, generator=draw)[:num_prompt]]).int()
    targets = torch.randint(300, (num_prompt,), generator=draw).int()
    asked: list[int] = []

    def logits(rows_M: Tensor) -> Tensor:
        asked.append(len(rows_M))
        return of_batch_TV.to(device)[rows_M]

    num_top = np.arange(num_sampled + num_prompt, dtype=np.int32) % 3
    words = ScoreWords(
        rows=rows.numpy(),
        targets=targets.numpy(),
        entries=num_top,
        positions=num_top,
        places=num_top[:num_sampled],
        num_top=num_top,
    )
    there = samples_L.to(device), rows.to(device), targets.to(device)
    flat = score_step(ops, words, there[1], there[2], logits, (sampled_LV.to(device), there[0])).cpu()
    assert torch.equal(flat[:4], samples_L) and len(flat) == 4 + len(rows) * 6
    found_MX = flat[4:].view(-1, 6)
    logits_MV = torch.cat([sampled_LV[rows[:num_sampled]], of_batch_TV[rows[num_sampled:]]])
    tokens_M = torch.cat([samples_L[rows[:num_sampled]], targets])
    best = logits_MV.log_softmax(-1).topk(2)
    own_M1 = logits_MV.log_softmax(-1).gather(1, tokens_M.long()[:, None])
    expected_MY = torch.cat([own_M1, best.values], dim=1)
    torch.testing.assert_close(found_MX[:, :3].contiguous().view(torch.float32), expected_MY)
    assert torch.equal(found_MX[:, 4:], best.indices.int())
    assert max(asked, default=0) <= MAX_PROMPT_ROWS and sum(asked) == num_prompt
