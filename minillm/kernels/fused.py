"""Fused elementwise kernels: RMSNorm (+ residual), q/k norm + rotary + cache write, SiLU * mul. Norms are in float32.

Values round to the tensors' dtype where transformers rounds: after the norm, before the weight; after SiLU, before the
product; after the residual add. Rotation is in float32 and rounds once (transformers also rounds its table).

Shapes: T tokens, D hidden size, F intermediate size, N query heads, K key/value heads, H head size, C = (N + 2K) * H,
B blocks, P block size, E entries of a rotary table.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton functions have no types that Python knows)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minillm.kernels.decode_attention import overlap_options

__all__ = ["add_rms_norm", "rms_norm", "rotary_and_store", "silu_mul"]

MAX_TILE_KV_HEADS = 8
"""Key heads, with their queries and values, that a program rotates together: enough for loads of 16 bytes."""


@triton.jit
def norm_kernel(x_ptr, residual_ptr, weight_ptr, y_ptr, eps,
                SIZE: tl.constexpr, PADDED: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    """One token per program. With ADD, residual += x first, and the sum is what is normalised."""
    offsets = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, PADDED)
    mask = tl.arange(0, PADDED) < SIZE
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x = (x + tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(residual_ptr + offsets, x, mask=mask)
        x = x.to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + tl.arange(0, PADDED), mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, (normed * weight).to(dtype), mask=mask)


def launch_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, is_add: bool) -> Tensor:
    """The launch behind both norms."""
    x_TD = x_TD.contiguous()
    y_TD = torch.empty_like(x_TD)
    size = x_TD.shape[-1]
    padded = triton.next_power_of_2(size)
    norm_kernel[(x_TD.numel() // size,)](
        x_TD, residual_TD, weight_D, y_TD, eps,
        SIZE=size, PADDED=padded, ADD=is_add, num_warps=min(16, max(1, padded // 512)),
    )  # fmt: skip
    return y_TD


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019) over the last dimension -> [T, D]."""
    return launch_norm(x_TD, x_TD, weight_D, eps, is_add=False)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """residual += x in place, then rms_norm(residual) -> [T, D]. `residual_TD` must be contiguous."""
    assert residual_TD.is_contiguous()
    return launch_norm(x_TD, residual_TD, weight_D, eps, is_add=True)


@triton.jit
def silu_mul_kernel(x_ptr, y_ptr, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Grid (tokens, tiles of F)."""
    token = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = dims < SIZE
    gate = tl.load(x_ptr + token * 2 * SIZE + dims, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + token * 2 * SIZE + SIZE + dims, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    decay = tl.exp(-tl.abs(gate))  # at most 1: no overflow on the way
    silu = (gate * tl.where(gate < 0, decay, 1.0) / (1.0 + decay)).to(dtype).to(tl.float32)
    tl.store(y_ptr + token * SIZE + dims, (silu * up).to(dtype), mask=mask)


def silu_mul(x_T2F: Tensor) -> Tensor:
    """silu(first half) * second half -> [T, F]."""
    x_T2F = x_T2F.contiguous()
    num_tokens, size = x_T2F.shape[0], x_T2F.shape[1] // 2
    y_TF = torch.empty((num_tokens, size), dtype=x_T2F.dtype, device=x_T2F.device)
    tile = min(1024, triton.next_power_of_2(size))
    silu_mul_kernel[(num_tokens, triton.cdiv(size, tile))](x_T2F, y_TF, SIZE=size, TILE=tile, num_warps=4)
    return y_TF


@triton.jit
def read_halves(base_ptr, dims, mask, HALF: tl.constexpr):
    """Both halves [1, H/2] of a vector of the head size, in float32."""
    first = tl.load(base_ptr + dims, mask=mask, other=0.0).to(tl.float32)[None, :]
    second = tl.load(base_ptr + HALF + dims, mask=mask, other=0.0).to(tl.float32)[None, :]
    return first, second


@triton.jit
def norm_halves(first, second, first_weight, second_weight, eps, HEAD_SIZE: tl.constexpr, dtype: tl.constexpr):
    """RMSNorm of heads given as two halves [heads, H/2], rounded to dtype before the weight and after it."""
    scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / HEAD_SIZE + eps)[:, None]
    first = ((first * scale).to(dtype).to(tl.float32) * first_weight).to(dtype).to(tl.float32)
    second = ((second * scale).to(dtype).to(tl.float32) * second_weight).to(dtype).to(tl.float32)
    return first, second


@triton.jit(do_not_specialize=["positions_ptr", "slots_ptr"])
def rotary_kernel(
    qkv_ptr, cos_sin_ptr, positions_ptr, slots_ptr, k_cache_ptr, v_cache_ptr, q_norm_ptr, k_norm_ptr, q_out_ptr, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED_HALF: tl.constexpr,
    TILE_HEADS: tl.constexpr, TILE_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HAS_NORM: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, tiles of key heads): their queries, keys and values, all asked for before any is used.

    OVERLAPS: the next kernel may start at once; until `gdc_wait` this reads what was there before the product of q, k
    and v: weights, the table, positions and slots.
    """
    if OVERLAPS:
        gdc_launch_dependents()
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    HALF: tl.constexpr = HEAD_SIZE // 2
    dtype: tl.constexpr = q_out_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    first_kv_head = tl.program_id(1) * TILE_KV_HEADS
    position = tl.load(positions_ptr + token).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)

    dims = tl.arange(0, PADDED_HALF)
    mask = dims < HALF
    cos, sin = read_halves(cos_sin_ptr + position * HEAD_SIZE, dims, mask, HALF)
    if HAS_NORM:
        q_weight, q_second_weight = read_halves(q_norm_ptr, dims, mask, HALF)
        k_weight, k_second_weight = read_halves(k_norm_ptr, dims, mask, HALF)
    if OVERLAPS:
        gdc_wait()
    heads = first_kv_head * GROUP + tl.arange(0, TILE_HEADS)
    kv_heads = first_kv_head + tl.arange(0, TILE_KV_HEADS)
    is_own = (tl.arange(0, TILE_HEADS) < TILE_KV_HEADS * GROUP) & (heads < NUM_HEADS)
    q_mask = is_own[:, None] & mask[None, :]
    kv_mask = (kv_heads < NUM_KV_HEADS)[:, None] & mask[None, :]
    q_offsets = heads[:, None] * HEAD_SIZE + dims[None, :]
    q_ptr = qkv_ptr + token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_SIZE) + q_offsets
    k_ptr = qkv_ptr + token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_SIZE) + NUM_HEADS * HEAD_SIZE
    k_ptr += kv_heads[:, None] * HEAD_SIZE + dims[None, :]
    v_ptr = k_ptr + NUM_KV_HEADS * HEAD_SIZE
    q_first = tl.load(q_ptr, mask=q_mask, other=0.0).to(tl.float32)
    q_second = tl.load(q_ptr + HALF, mask=q_mask, other=0.0).to(tl.float32)
    k_first = tl.load(k_ptr, mask=kv_mask, other=0.0).to(tl.float32)
    k_second = tl.load(k_ptr + HALF, mask=kv_mask, other=0.0).to(tl.float32)
    v_first = tl.load(v_ptr, mask=kv_mask, other=0.0)
    v_second = tl.load(v_ptr + HALF, mask=kv_mask, other=0.0)

    if HAS_NORM:
        q_first, q_second = norm_halves(q_first, q_second, q_weight, q_second_weight, eps, HEAD_SIZE, dtype)
        k_first, k_second = norm_halves(k_first, k_second, k_weight, k_second_weight, eps, HEAD_SIZE, dtype)
    q_out_ptr += token * (NUM_HEADS * HEAD_SIZE) + q_offsets
    tl.store(q_out_ptr, (q_first * cos - q_second * sin).to(dtype), mask=q_mask)
    tl.store(q_out_ptr + HALF, (q_second * cos + q_first * sin).to(dtype), mask=q_mask)
    cells = (slot // BLOCK_SIZE * NUM_KV_HEADS + kv_heads) * BLOCK_SIZE + slot % BLOCK_SIZE
    cells = cells[:, None] * HEAD_SIZE + dims[None, :]
    tl.store(k_cache_ptr + cells, (k_first * cos - k_second * sin).to(dtype), mask=kv_mask)
    tl.store(k_cache_ptr + cells + HALF, (k_second * cos + k_first * sin).to(dtype), mask=kv_mask)
    tl.store(v_cache_ptr + cells, v_first, mask=kv_mask)
    tl.store(v_cache_ptr + cells + HALF, v_second, mask=kv_mask)


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

    `slots_T` = block * P + offset in the block. Each block of the cache must be contiguous, as must be its blocks.
    """
    _, _, _, block_size, head_size = kv_2BKPH.shape
    qkv_TC = qkv_TC.contiguous()
    num_tokens = qkv_TC.shape[0]
    q_TNH = torch.empty((num_tokens, num_heads, head_size), dtype=qkv_TC.dtype, device=qkv_TC.device)
    has_norm = q_norm_H is not None and k_norm_H is not None
    padded_half = triton.next_power_of_2(head_size // 2)
    tile_kv_heads = min(MAX_TILE_KV_HEADS, triton.next_power_of_2(num_kv_heads))
    tile_heads = triton.next_power_of_2(tile_kv_heads * num_heads // num_kv_heads)
    rotary_kernel[(num_tokens, triton.cdiv(num_kv_heads, tile_kv_heads))](
        qkv_TC, cos_sin_EH, positions_T, slots_T, kv_2BKPH[0], kv_2BKPH[1],
        q_norm_H if has_norm else qkv_TC, k_norm_H if has_norm else qkv_TC, q_TNH, eps,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_SIZE=head_size, PADDED_HALF=padded_half,
        TILE_HEADS=tile_heads, TILE_KV_HEADS=tile_kv_heads, BLOCK_SIZE=block_size, HAS_NORM=has_norm,
        num_warps=min(4, max(1, padded_half * tile_heads // 256)), **overlap_options(qkv_TC.device),
    )  # fmt: skip
    return q_TNH
