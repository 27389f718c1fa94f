"""The oracle against independent implementations: PyTorch's own attention and norm, transformers' layers."""

from __future__ import annotations

import pytest
import torch

from minillm.kernels import reference


def test_attention_equals_sdpa_of_each_row(make_batch) -> None:
    rows = [(1, 1), (1, 16), (1, 33), (5, 5), (3, 40), (17, 17), (16, 32)]
    q_TNH, inputs = make_batch(rows, num_heads=6, num_kv_heads=2, dtype=torch.float64, device=torch.device("cpu"))
    out_TNH = reference.attention(q_TNH, **inputs)
    start = 0
    for (count, context), seat in zip(rows, inputs["rows_R"].tolist(), strict=True):
        slots = torch.arange(context)
        blocks = inputs["block_tables_SM"][seat].long()[slots // 16]
        k_KcH, v_KcH = (inputs["kv_2BKPH"][i, blocks, :, slots % 16].transpose(0, 1) for i in (0, 1))
        mask = torch.ones(count, context, dtype=torch.bool).tril(context - count)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q_TNH[start : start + count].transpose(0, 1),
            k_KcH.repeat_interleave(3, 0),
            v_KcH.repeat_interleave(3, 0),
            attn_mask=mask,
            scale=inputs["scale"],
        )
        torch.testing.assert_close(out_TNH[start : start + count], expected.transpose(0, 1))
        start += count


def test_attention_uses_the_scale(make_batch) -> None:
    q_TNH, inputs = make_batch([(2, 9)], dtype=torch.float64, device=torch.device("cpu"))
    half = reference.attention(q_TNH, **{**inputs, "scale": inputs["scale"] / 2})
    torch.testing.assert_close(half, reference.attention(q_TNH / 2, **inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_equal_transformers(dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    x_TD, residual_TD = torch.randn(2, 5, 96, dtype=dtype)
    # transformers squares in float32 whatever the dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(reference.rms_norm(x_TD, norm.weight.data, 1e-5), norm(x_TD).detach(), **tolerance)
    expected = norm(x_TD + residual_TD).detach()
    total_TD = x_TD + residual_TD
    y_TD = reference.add_rms_norm(x_TD, residual_TD, norm.weight.data, 1e-5)
    torch.testing.assert_close(y_TD, expected, **tolerance)
    assert torch.equal(residual_TD, total_TD)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_silu_mul_rounds_as_transformers_does(dtype) -> None:
    gate_TF, up_TF = torch.randn(2, 4, 48, dtype=dtype)
    expected = torch.nn.functional.silu(gate_TF) * up_TF
    assert torch.equal(reference.silu_mul(torch.cat((gate_TF, up_TF), -1)), expected)


@pytest.mark.parametrize("has_norm", [False, True])
def test_rotary_and_store_equals_transformers(has_norm) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    num_heads, num_kv_heads, head_size, block_size = 4, 2, 16, 16
    positions_T, slots_T = torch.tensor([0, 3, 30, 7, 8]), torch.tensor([40, 17, 0, 31, 32])
    angles_Eh = torch.arange(32)[:, None] / 100 ** (torch.arange(8) / 8)
    cos_sin_EH = torch.cat((angles_Eh.cos(), angles_Eh.sin()), -1)
    qkv_TC = torch.randn(5, (num_heads + 2 * num_kv_heads) * head_size)
    kv_2BKPH = torch.full((2, 3, num_kv_heads, block_size, head_size), torch.nan)
    norms = [LlamaRMSNorm(head_size, eps=1e-6) for _ in range(2)]
    for norm in norms:
        norm.weight.data.normal_()
    q_TNH = reference.rotary_and_store(
        qkv_TC,
        cos_sin_EH=cos_sin_EH,
        positions_T=positions_T.int(),
        slots_T=slots_T,
        kv_2BKPH=kv_2BKPH,
        q_norm_H=norms[0].weight.data if has_norm else None,
        k_norm_H=norms[1].weight.data if has_norm else None,
        eps=1e-6,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
    )
    q, k, v = (
        x.view(5, -1, head_size) for x in qkv_TC.split([num_heads * head_size] + 2 * [num_kv_heads * head_size], -1)
    )
    if has_norm:
        q, k = norms[0](q).detach(), norms[1](k).detach()
    cos, sin = (torch.cat((x, x), -1)[positions_T][None] for x in cos_sin_EH.chunk(2, -1))
    q, k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    torch.testing.assert_close(q_TNH, q[0].transpose(0, 1))
    torch.testing.assert_close(kv_2BKPH[0].transpose(1, 2).flatten(0, 1)[slots_T], k[0].transpose(0, 1))
    assert torch.equal(kv_2BKPH[1].transpose(1, 2).flatten(0, 1)[slots_T], v)
    assert int(kv_2BKPH.isnan().sum()) == kv_2BKPH.numel() - 2 * 5 * num_kv_heads * head_size
