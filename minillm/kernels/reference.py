"""The oracle: every kernel in plain torch, as simple as it can be, in any floating dtype (float64 too).

It rounds where the fast kernels round, computes in at least float32 and is never tuned. It knows no device.

Shapes: T tokens, D hidden size, F intermediate size, N query heads, K key/value heads, H head size, C = (N + 2K) * H,
R rows, S seats, M blocks a seat can hold, B blocks, P block size, O output features, E entries of a rotary table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minillm.kernels.edits_reference import edit_logits, keep_edited, note_inputs
from minillm.kernels.sampling_reference import keep_tokens, sample
from minillm.kernels.scores_reference import score_tokens
from minillm.kernels.step_inputs import expand_step_inputs

__all__ = [
    "add_rms_norm",
    "attention",
    "edit_logits",
    "expand_step_inputs",
    "gated_linear",
    "keep_edited",
    "keep_tokens",
    "linear",
    "note_inputs",
    "rms_norm",
    "rotary_and_store",
    "sample",
    "score_tokens",
    "silu_mul",
]


def linear(x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b -> [T, O]."""
    y_TO = x_TD @ weight_OD.T
    return y_TO if bias_O is None else y_TO + bias_O


def widen(x: Tensor) -> Tensor:
    """The tensor in the dtype that sums are made in: float32, or float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019) over the last dimension -> [T, D]; rounded to x's dtype before the weight."""
    wide = widen(x_TD)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x_TD.dtype) * weight_D


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """residual += x in place, then rms_norm(residual) -> [T, D]."""
    residual_TD += x_TD
    return rms_norm(residual_TD, weight_D, eps)


def silu_mul(x_T2F: Tensor) -> Tensor:
    """silu(first half) * second half -> [T, F]; the first factor is rounded to x's dtype."""
    gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
    return torch.nn.functional.silu(widen(gate_TF)).to(x_T2F.dtype) * up_TF


def gated_linear(x_TD: Tensor, weight_2FD: Tensor, bias_2F: Tensor | None) -> Tensor:
    """silu(first half) * second half of x W^T + b -> [T, F]."""
    return silu_mul(linear(x_TD, weight_2FD, bias_2F))


def rotate(x_TNH: Tensor, cos_sin_TH: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) in the halves layout: element i turns with element i + H/2."""
    cos_T1h, sin_T1h = cos_sin_TH[:, None].to(widen(x_TNH).dtype).chunk(2, dim=-1)
    first, second = widen(x_TNH).chunk(2, dim=-1)
    turned = torch.cat((first * cos_T1h - second * sin_T1h, second * cos_T1h + first * sin_T1h), dim=-1)
    return turned.to(x_TNH.dtype)


def rotary_and_store(
    qkv_TC: Tensor,
    *,
    cos_sin_EH: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    kv_2BKPH: Tensor,
    q_norm_H: Tensor | None,
    k_norm_H: Tensor | None,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """Normalise q and k if weights are given, rotate them, write k and v to the cache -> rotated q [T, N, H].

    cos_sin_EH holds H/2 cosines, then H/2 sines per position. `slots_T` = block * P + offset in the block.
    """
    num_tokens, (_, _, _, block_size, head_size) = qkv_TC.shape[0], kv_2BKPH.shape
    qkv_TXH = qkv_TC.view(num_tokens, num_heads + 2 * num_kv_heads, head_size)
    q_TNH, k_TKH, v_TKH = torch.split(qkv_TXH, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm_H is not None and k_norm_H is not None:
        q_TNH, k_TKH = rms_norm(q_TNH, q_norm_H, eps), rms_norm(k_TKH, k_norm_H, eps)
    cos_sin_TH = cos_sin_EH[positions_T.long()]
    blocks_T, offsets_T = slots_T // block_size, slots_T % block_size
    kv_2BKPH[0][blocks_T, :, offsets_T] = rotate(k_TKH, cos_sin_TH)
    kv_2BKPH[1][blocks_T, :, offsets_T] = v_TKH
    return rotate(q_TNH, cos_sin_TH)


def attention(
    q_TNH: Tensor,
    *,
    kv_2BKPH: Tensor,
    block_tables_SM: Tensor,
    rows_R: Tensor,
    query_starts_R1: Tensor,
    context_lens_R: Tensor,
    scale: float,
    num_decodes: int,
    max_query_len: int,
    max_context_len: int,
    block_tokens: int | None = None,
    one_launch: bool = False,
) -> Tensor:
    """Causal attention of each row's queries over its keys in the paged cache -> [T, N, H].

    Query i of a row with n queries and context c sees keys 0 .. c - n + i. Each query head reads the key head of its
    group. `num_decodes`, the bounds and the two options only steer fast kernels and are not read here.
    """
    _, _, num_kv_heads, block_size, head_size = kv_2BKPH.shape
    group = q_TNH.shape[1] // num_kv_heads
    out_TNH = torch.zeros_like(q_TNH)
    for i, seat in enumerate(rows_R.tolist()):
        start, end, context = int(query_starts_R1[i]), int(query_starts_R1[i + 1]), int(context_lens_R[i])
        blocks = block_tables_SM[seat, : -(-context // block_size)].long()
        kv_2NcH = widen(kv_2BKPH[:, blocks]).transpose(1, 2).flatten(2, 3)[:, :, :context].repeat_interleave(group, 1)
        scores_Nnc = torch.einsum("tnh,nch->ntc", widen(q_TNH[start:end]), kv_2NcH[0]) * scale
        last_n = torch.arange(context - (end - start), context, device=q_TNH.device)
        hidden_nc = torch.arange(context, device=q_TNH.device)[None] > last_n[:, None]
        weights_Nnc = scores_Nnc.masked_fill(hidden_nc, -torch.inf).softmax(-1)
        out_TNH[start:end] = torch.einsum("ntc,nch->tnh", weights_Nnc, kv_2NcH[1]).to(q_TNH.dtype)
    return out_TNH
