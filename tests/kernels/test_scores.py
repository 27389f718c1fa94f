"""Logprobs of tokens: torch and Triton against float64, and which of equal logits is the likelier one.

Triton runs in its interpreter where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from minillm.kernels import scores
from minillm.kernels import scores_reference as oracle
from minillm.kernels.sampling_reference import NOT_FINITE

INF = float("inf")


class Scores(NamedTuple):
    """Words, unpacked."""

    logprobs_MY: Tensor
    num_likelier_M: Tensor
    top_Mk: Tensor


def scores_of(kernels: ModuleType, logits_LV: Tensor, tokens: Tensor, rows: Tensor, num_top: int) -> Scores:
    words_MX = kernels.score_tokens(logits_LV, tokens.int(), rows.int(), num_top).cpu()
    num_top = (words_MX.shape[1] - 2) // 2
    assert words_MX.dtype == torch.int32 and words_MX.shape == (len(rows), 2 + 2 * num_top)
    logprobs_MY, num_likelier_M1, top_Mk = words_MX.split([1 + num_top, 1, num_top], dim=1)
    return Scores(logprobs_MY.contiguous().view(torch.float32), num_likelier_M1.flatten(), top_Mk)


def expected_scores(logits_LV: Tensor, tokens: Tensor, rows: Tensor, num_top: int) -> Scores:
    """In float64; of equal logits the lower token is the likelier one."""
    logits_MV, tokens_M1 = logits_LV.cpu().double()[rows], tokens[rows].clamp(min=0).long()[:, None]
    top_Mk = logits_MV.sort(dim=1, descending=True, stable=True).indices[:, :num_top]
    logprobs_MY = logits_MV.log_softmax(-1).gather(1, torch.cat([tokens_M1, top_Mk], dim=1))
    return Scores(logprobs_MY, (logits_MV > logits_MV.gather(1, tokens_M1)).sum(1), top_Mk)


def random_rows(num: int, vocab_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, samples (one of them NOT_FINITE), and the rows that are scored: some twice, in no order."""
    draw = torch.Generator().manual_seed(seed)
    logits_LV = torch.randn(num, vocab_size, generator=draw) * 4
    tokens_L = torch.randint(vocab_size, (num,), generator=draw)
    tokens_L[1] = NOT_FINITE
    return logits_LV, tokens_L, torch.tensor([num - 1, 1, 0, 1])


def check(found: Scores, expected: Scores, logits_MV: Tensor, *, is_exact: bool) -> None:
    """`is_exact`: of equal logits the order counts as well, and sums are made in parts."""
    atol = 1e-5 if is_exact else 3e-5
    torch.testing.assert_close(found.logprobs_MY, expected.logprobs_MY.float(), rtol=0, atol=atol, equal_nan=True)
    assert torch.equal(found.num_likelier_M, expected.num_likelier_M.int())
    if is_exact:
        assert torch.equal(found.top_Mk, expected.top_Mk.int())
    else:
        values_Mk, wanted_Mk = (logits_MV.gather(1, each.top_Mk.long()) for each in (found, expected))
        assert torch.equal(values_Mk, wanted_Mk)
        assert all(len(set(row)) == len(row) for row in found.top_Mk.tolist())


@pytest.mark.parametrize(
    ("vocab_size", "num_top", "dtype"),
    [
        (33, 20, torch.float32),
        (1000, 0, torch.bfloat16),
        (1000, 20, torch.float16),
        (3001, 1, torch.float32),
        (3001, 32, torch.bfloat16),
        (49_152, 20, torch.bfloat16),
        (151_936, 2, torch.float16),
    ],
)
def test_logprobs_are_those_of_float64(
    device: torch.device, poisoned: None, vocab_size: int, num_top: int, dtype: torch.dtype
) -> None:
    """Of logits of 16 bits many are equal."""
    logits_LV, tokens_L, rows_M = random_rows(4, vocab_size, seed=num_top)
    logits_LV = logits_LV.to(dtype)
    expected = expected_scores(logits_LV, tokens_L, rows_M, num_top)
    there = logits_LV.to(device), tokens_L.to(device), rows_M.to(device), num_top
    check(scores_of(scores, *there), expected, logits_LV[rows_M], is_exact=True)
    check(scores_of(oracle, *there), expected, logits_LV[rows_M], is_exact=False)


def test_equal_logits_come_by_token(device: torch.device) -> None:
    """0 and -0 too; the likeliest all in one part, all at its edges, and a row of equals."""
    logits_LV = torch.full((4, 3000), -1.0)
    logits_LV[0, [5, 1023, 1024, 2047, 2999]] = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0])
    logits_LV[1, 100:130] = 7.0
    logits_LV[2, [2999, 0]] = 3.0
    tokens_L, rows_M = torch.tensor([2999, 129, 1, 8]), torch.arange(4)
    found = scores_of(scores, logits_LV.to(device), tokens_L.to(device), rows_M.to(device), 20)
    check(found, expected_scores(logits_LV, tokens_L, rows_M, 20), logits_LV, is_exact=True)
    assert found.top_Mk[0, :6].tolist() == [5, 1023, 1024, 2047, 2999, 0]
    assert found.num_likelier_M.tolist() == [0, 0, 2, 0]


def test_more_likeliest_than_there_are(device: torch.device) -> None:
    """All are listed, those of a part that has no more of them too."""
    logits_LV, tokens_L, rows_M = *random_rows(3, 1050, seed=0)[:2], torch.tensor([2])
    logits_LV[2] = torch.arange(1050).flip(0)
    logits_LV[2, 1040] = 500.5
    found = scores_of(scores, logits_LV.to(device), tokens_L.to(device), rows_M.to(device), 5000)
    check(found, expected_scores(logits_LV, tokens_L, rows_M, 5000), logits_LV[rows_M], is_exact=True)


@pytest.mark.parametrize("kernels", [scores, oracle])
def test_forbidden_tokens_have_no_probability_and_nothing_else_is_lost(
    device: torch.device, kernels: ModuleType
) -> None:
    """A part without a token that may come, a single one in all, and one's own among the forbidden."""
    logits_LV, tokens_L, rows_M = random_rows(4, 3000, seed=1)
    logits_LV[:, :1100] = -INF
    logits_LV[0] = -INF
    logits_LV[0, 2500] = 3.0
    logits_LV[3, 1100:] = -INF
    logits_LV[3, 7:17] = 1.0
    tokens_L[:] = torch.tensor([2500, 3, 1200, 8])
    rows_M = torch.arange(4)
    found = scores_of(kernels, logits_LV.to(device), tokens_L.to(device), rows_M.to(device), 20)
    check(found, expected_scores(logits_LV, tokens_L, rows_M, 20), logits_LV, is_exact=kernels is scores)
    assert found.logprobs_MY[0].tolist() == [0.0, 0.0] + [-INF] * 19
    assert found.logprobs_MY[1, 0] == -INF and found.num_likelier_M[1] == 1900
    assert not found.logprobs_MY.isnan().any()


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN slice) encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("kernels", [scores, oracle])
def test_rows_that_are_not_finite_have_no_logprobs(device: torch.device, kernels: ModuleType) -> None:
    """Their tokens are in the vocabulary all the same, and the row beside them is whole."""
    logits_LV, tokens_L, rows_M = random_rows(5, 2100, seed=2)
    expected = expected_scores(logits_LV, tokens_L, rows_M, 3)
    logits_LV[2, 1500] = torch.nan
    logits_LV[3, :1200] = -torch.tensor(torch.nan)
    rows_M = torch.cat([rows_M, torch.tensor([2, 3])])
    for bad in (-INF, INF, torch.nan):
        logits_LV[3, 1200:] = bad
        found = scores_of(kernels, logits_LV.to(device), tokens_L.to(device), rows_M.to(device), 3)
        check(Scores(*(x[:4] for x in found)), expected, logits_LV[rows_M[:4]], is_exact=True)
        assert found.logprobs_MY[4:].isnan().all()
        assert 0 <= found.top_Mk.min() and found.top_Mk.max() < 2100


def test_nothing_is_scored_of_no_rows(device: torch.device) -> None:
    none = torch.zeros(0, dtype=torch.int32, device=device)
    for kernels in (scores, oracle):
        assert kernels.score_tokens(torch.zeros(2, 50, device=device), none, none, 3).shape == (0, 8)


def test_one_form_of_each_kernel_serves_all_requests(found_without_gpu: Callable[[str], Any]) -> None:
    """Start-up scores padding, and no step afterwards compiles."""
    found = found_without_gpu("tests.kernels.score_without_gpu")
    assert found == {"kernels": ["merge_kernel", "part_kernel"], "first": 2, "in all": 2}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_full_size_on_a_gpu(dtype: torch.dtype) -> None:
    logits_LV, tokens_L, _ = random_rows(256, 151_936, seed=3)
    logits_LV, rows_M = logits_LV.to(dtype), torch.randperm(256)
    found = scores_of(scores, logits_LV.cuda(), tokens_L.cuda(), rows_M.cuda(), 20)
    check(found, expected_scores(logits_LV, tokens_L, rows_M, 20), logits_LV[rows_M], is_exact=True)
