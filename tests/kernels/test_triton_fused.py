"""Fused norms, rotary + cache write and SiLU * mul against the oracle, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from minillm.kernels import gpu, reference
from tests.kernels.test_skinny import check_as_near, operands

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

# Both sides round at the same places, so they differ where an intermediate lies on the edge of a rounding: by one unit
# in the last place at each of the two roundings.
ULPS = {torch.float32: 2**-21, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def check_close(ours, expected) -> None:
    """Equal within two units in the last place of the oracle in the same dtype, nearly all values within none."""
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    tolerance = ULPS[ours.dtype]
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=1e-6)
    if ours.dtype != torch.float32:
        assert float((ours == expected).float().mean()) > 0.98


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 24, 64, 576, 960, 1536])
def test_norms(device, poisoned, size, dtype) -> None:
    x_TD, residual_TD = (3 * torch.randn(2, 5, size)).to(device, dtype)
    weight_D = torch.randn(size).to(device, dtype)
    check_close(gpu.rms_norm(x_TD, weight_D, 1e-5), reference.rms_norm(x_TD, weight_D, 1e-5))
    ours_TD, theirs_TD = residual_TD.clone(), residual_TD.clone()
    y_TD = gpu.add_rms_norm(x_TD, ours_TD, weight_D, 1e-5)
    check_close(y_TD, reference.add_rms_norm(x_TD, theirs_TD, weight_D, 1e-5))
    assert torch.equal(ours_TD, theirs_TD)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_tokens", [3, 64, 65, 300])
def test_a_product_into_the_residual(device, poisoned, num_tokens, has_bias, dtype) -> None:
    """Added as it is stored, for many rows in half precision without a bias; else left to be added."""
    x_TD, _, weight_OD, bias_O, before_TO = operands(num_tokens, 96, 200, dtype, device)
    given = bias_O if has_bias else None
    residual_TO = before_TO.clone()
    rest = gpu.linear_into(residual_TO, x_TD, weight_OD, given)
    assert (rest is None) == (num_tokens > 64 and not has_bias and dtype != torch.float32)
    if rest is not None:
        assert torch.equal(residual_TO, before_TO)
        residual_TO = residual_TO + (rest.sum(0) if rest.ndim == 3 else rest).to(dtype)
    twin_TO = before_TO + reference.linear(x_TD, weight_OD, given)
    exact_bias_O = None if given is None else given.double()
    exact_TO = before_TO.double() + reference.linear(x_TD.double(), weight_OD.double(), exact_bias_O)
    check_as_near(residual_TO, twin_TO, exact_TO)


def test_norm_is_exact_to_float32_and_uses_eps(device) -> None:
    x_TD, weight_D = 1e-3 * torch.randn(3, 100, device=device), torch.randn(100, device=device)
    exact_TD = reference.rms_norm(x_TD.double(), weight_D.double(), 1e-5)
    torch.testing.assert_close(gpu.rms_norm(x_TD, weight_D, 1e-5).double(), exact_TD, rtol=1e-6, atol=1e-7)


def test_norm_of_a_view(device) -> None:
    x_TD, weight_D = torch.randn(4, 96, device=device)[:, 32:64], torch.randn(32, device=device)
    check_close(gpu.rms_norm(x_TD, weight_D, 1e-5), reference.rms_norm(x_TD, weight_D, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 48, 1536, 2500])
def test_silu_mul(device, poisoned, size, dtype) -> None:
    x_T2F = (4 * torch.randn(3, 2 * size)).to(device, dtype)
    x_T2F[0, :4] = torch.tensor([0.0, -100.0, 100.0, -30.0])
    check_close(gpu.silu_mul(x_T2F), reference.silu_mul(x_T2F))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(
    "num_heads, num_kv_heads, head_size, block_size",
    [(4, 4, 2, 16), (9, 3, 64, 16), (14, 2, 64, 32), (8, 1, 80, 64), (10, 10, 8, 16)],
)
def test_rotary_and_store(device, poisoned, num_heads, num_kv_heads, head_size, block_size, has_norm, dtype) -> None:
    positions_T = torch.tensor([0, 1, 17, 63, 500, 31, 2], dtype=torch.int32, device=device)
    slots_T = torch.tensor([0, block_size, block_size - 1, 3 * block_size + 5, 17, 18, 40], device=device)
    angles_Eh = torch.arange(512)[:, None] / 1000 ** (torch.arange(head_size // 2) / (head_size // 2))
    qkv_TC = torch.randn(7, (num_heads + 2 * num_kv_heads) * head_size).to(device, dtype)
    weights = torch.randn(2, head_size).to(device, dtype)
    outs, caches = [], []
    for kernels in (gpu, reference):
        kv_2BKPH = torch.full((2, 5, num_kv_heads, block_size, head_size), torch.nan, dtype=dtype, device=device)
        caches.append(kv_2BKPH)
        q_TNH = kernels.rotary_and_store(
            qkv_TC,
            cos_sin_EH=torch.cat((angles_Eh.cos(), angles_Eh.sin()), -1).to(device),
            positions_T=positions_T,
            slots_T=slots_T,
            kv_2BKPH=kv_2BKPH,
            q_norm_H=weights[0] if has_norm else None,
            k_norm_H=weights[1] if has_norm else None,
            eps=1e-6,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
        )
        outs.append(q_TNH)
    # A rotation subtracts: its error is relative to the pair, not to the result.
    tolerance = ULPS[dtype]
    torch.testing.assert_close(outs[0], outs[1], rtol=tolerance, atol=8 * tolerance)
    torch.testing.assert_close(caches[0], caches[1], rtol=tolerance, atol=8 * tolerance, equal_nan=True)
    assert torch.equal(caches[0][1].nan_to_num(7), caches[1][1].nan_to_num(7))


@pytest.mark.gpu
def test_store_beyond_two_to_the_31_elements(device) -> None:
    num_blocks = 2**31 // (8 * 16 * 128) + 3
    kv_2BKPH = torch.zeros((2, num_blocks, 8, 16, 128), dtype=torch.bfloat16, device=device)
    qkv_TC = torch.randn(2, 32 * 128, device=device).to(torch.bfloat16)
    cos_sin_EH = torch.cat((torch.ones(4, 64), torch.zeros(4, 64)), -1).to(device)
    gpu.rotary_and_store(
        qkv_TC,
        cos_sin_EH=cos_sin_EH,
        positions_T=torch.tensor([0, 1], dtype=torch.int32, device=device),
        slots_T=torch.tensor([num_blocks * 16 - 1, 5], device=device),
        kv_2BKPH=kv_2BKPH,
        q_norm_H=None,
        k_norm_H=None,
        eps=1e-6,
        num_heads=16,
        num_kv_heads=8,
    )
    stored_2KH = kv_2BKPH[:, -1, :, -1]
    assert torch.equal(stored_2KH.flatten(), qkv_TC[0, 16 * 128 :])
    assert torch.equal(kv_2BKPH[:, 0, :, 5].flatten(), qkv_TC[1, 16 * 128 :])
    assert int(torch.count_nonzero(kv_2BKPH)) <= 2 * 2 * 8 * 128
