"""Attention of a few rows of one token straight from the product of q, k and v: norm, rotation and cache write in one.

A row's old keys are cut into segments as in `decode_attention`; the new key is a part of its own, made by a program
that also writes it to the cache, and the merge of there folds all parts. The first old keys are asked for before the
kernel before this one ends (programmatic dependent launch): before `gdc_wait` it may only read what no kernel of the
step writes, which are lengths, tables and old keys. It knows no requests.

    parts of a row   | new key | segment 0 | segment 1 | ... |

Shapes: T tokens = rows, N query heads, K key/value heads, H head size, C = (N + 2K) * H, S seats, M blocks a seat can
hold, B blocks, P block size, G most segments of a row, E positions.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Triton functions have no types that Python knows)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minillm.kernels.attention import LOG2_E, num_multiprocessors, read_pages, read_tile
from minillm.kernels.dealing import segment_constants, segment_size
from minillm.kernels.decode_attention import Parts, can_overlap, head_constants, merge_parts

__all__ = ["fused_decode"]


@triton.jit
def turned(x, partner, norm, norm_partner, cos, sin, eps, HEAD_SIZE: tl.constexpr, HAS_NORM: tl.constexpr):
    """Heads [heads, dims], normed and rotated: element i turns with its partner i +- H/2."""
    dtype: tl.constexpr = x.dtype
    x = x.to(tl.float32)
    partner = partner.to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / HEAD_SIZE + eps)[:, None]
        x = ((x * scale).to(dtype).to(tl.float32) * norm[None, :]).to(dtype).to(tl.float32)
        partner = ((partner * scale).to(dtype).to(tl.float32) * norm_partner[None, :]).to(dtype).to(tl.float32)
    return (x * cos[None, :] + partner * sin[None, :]).to(dtype)


@triton.jit
def attend_tile(q, k, v, is_key, acc, top, total, scale_log2):
    """One turn of the online softmax, as in `decode_attention`: q [dims, heads], k and v [keys, dims]."""
    scores = tl.dot(k, q, input_precision="ieee") * scale_log2
    scores = tl.where(is_key[:, None], scores, float("-inf"))
    new_top = tl.ceil(tl.maximum(top, tl.max(scores, 0)))
    weights = tl.exp2(scores - new_top[None, :]).to(v.dtype)
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights.to(tl.float32), 0)
    acc = tl.dot(tl.trans(v), weights, acc * shrink[None, :], input_precision="ieee")
    return acc, new_top, total


@triton.jit(do_not_specialize=["slots_ptr", "rows_ptr", "context_lens_ptr", "table_stride"])
def fused_decode_kernel(
    qkv_ptr, q_norm_ptr, k_norm_ptr, cos_sin_ptr, slots_ptr, k_ptr, v_ptr, acc_ptr, top_ptr, total_ptr,
    block_tables_ptr, rows_ptr, context_lens_ptr, scale_log2, eps, table_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED_HEAD: tl.constexpr,
    PADDED_GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_KEYS: tl.constexpr, MIN_SEGMENT: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr, HAS_NORM: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Grid (key heads, 1 + shares of a row, rows); row r is token r.

    The first program of a row has the new key, the others share the old ones. Writes acc [R, N, 1 + G, H], top and
    total [R, N, 1 + G], and the new key and value to the cache.
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    HALF: tl.constexpr = HEAD_SIZE // 2
    BLOCK_STRIDE: tl.constexpr = NUM_KV_HEADS * BLOCK_SIZE * HEAD_SIZE
    if OVERLAPS:
        gdc_launch_dependents()
    kv_head = tl.program_id(0)
    share = tl.program_id(1) - 1
    row = tl.program_id(2).to(tl.int64)
    num_old = tl.load(context_lens_ptr + row) - 1
    size = segment_size(num_old, MIN_SEGMENT, MAX_SEGMENTS, TILE_KEYS)
    num_own = tl.cdiv(tl.cdiv(num_old, size), tl.num_programs(1) - 1)
    segment = share * num_own
    begin = segment * size
    end = tl.minimum(begin + num_own * size, num_old)
    if begin >= end and share >= 0:
        return
    dims = tl.arange(0, PADDED_HEAD)
    is_dim = dims < HEAD_SIZE
    partners = (dims + HALF) % HEAD_SIZE
    cos_ptr = cos_sin_ptr + num_old.to(tl.int64) * HEAD_SIZE + dims % HALF
    cos = tl.load(cos_ptr, mask=is_dim, other=0.0)
    sin = tl.load(cos_ptr + HALF, mask=is_dim, other=0.0) * tl.where(dims < HALF, -1.0, 1.0)
    q_norm = cos
    q_norm_partner = cos
    if HAS_NORM:
        q_norm = tl.load(q_norm_ptr + dims, mask=is_dim, other=0.0).to(tl.float32)
        q_norm_partner = tl.load(q_norm_ptr + partners, mask=is_dim, other=0.0).to(tl.float32)
    token_ptr = qkv_ptr + row * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_SIZE)
    group = tl.arange(0, PADDED_GROUP)
    mask = (group < GROUP)[:, None] & is_dim[None, :]
    q_ptr = token_ptr + (kv_head * GROUP + group)[:, None] * HEAD_SIZE
    heads = row * NUM_HEADS + kv_head * GROUP + group
    k_ptr += kv_head * (BLOCK_SIZE * HEAD_SIZE)
    v_ptr += kv_head * (BLOCK_SIZE * HEAD_SIZE)
    if share < 0:
        k_norm = cos
        k_norm_partner = cos
        if HAS_NORM:
            k_norm = tl.load(k_norm_ptr + dims, mask=is_dim, other=0.0).to(tl.float32)
            k_norm_partner = tl.load(k_norm_ptr + partners, mask=is_dim, other=0.0).to(tl.float32)
        slot = tl.load(slots_ptr + row)
        cell = slot // BLOCK_SIZE * BLOCK_STRIDE + slot % BLOCK_SIZE * HEAD_SIZE + dims[None, :]
        if OVERLAPS:
            gdc_wait()
        new_ptr = token_ptr + (NUM_HEADS + kv_head + tl.arange(0, 1))[:, None] * HEAD_SIZE
        new_q = tl.load(q_ptr + dims[None, :], mask=mask, other=0.0)
        new_q_partner = tl.load(q_ptr + partners[None, :], mask=mask, other=0.0)
        new_k = tl.load(new_ptr + dims[None, :], mask=is_dim[None, :], other=0.0)
        new_k_partner = tl.load(new_ptr + partners[None, :], mask=is_dim[None, :], other=0.0)
        new_v = tl.load(new_ptr + NUM_KV_HEADS * HEAD_SIZE + dims[None, :], mask=is_dim[None, :], other=0.0)
        new_q = turned(new_q, new_q_partner, q_norm, q_norm_partner, cos, sin, eps, HEAD_SIZE, HAS_NORM)
        new_k = turned(new_k, new_k_partner, k_norm, k_norm_partner, cos, sin, eps, HEAD_SIZE, HAS_NORM)
        tl.store(k_ptr + cell, new_k, mask=is_dim[None, :])
        tl.store(v_ptr + cell, new_v, mask=is_dim[None, :])
        score = tl.sum(new_q.to(tl.float32) * new_k.to(tl.float32), 1) * scale_log2
        new_parts = heads * (MAX_SEGMENTS + 1)
        weight = tl.exp2(score - tl.ceil(score)).to(new_v.dtype).to(tl.float32)
        value = new_v.to(tl.float32) * weight[:, None]
        tl.store(acc_ptr + new_parts[:, None] * HEAD_SIZE + dims[None, :], value, mask=mask)
        tl.store(top_ptr + new_parts, tl.ceil(score), mask=group < GROUP)
        tl.store(total_ptr + new_parts, weight, mask=group < GROUP)
        return
    table_ptr = block_tables_ptr + tl.load(rows_ptr + row).to(tl.int64) * table_stride
    keys = tl.arange(0, TILE_KEYS)
    pages = read_pages(table_ptr, begin, end, BLOCK_SIZE, TILE_KEYS)
    k = read_tile(k_ptr, pages, begin, end,
                  BLOCK_STRIDE, BLOCK_SIZE, TILE_KEYS, HEAD_SIZE, PADDED_HEAD, True)  # fmt: skip
    v = read_tile(v_ptr, pages, begin, end,
                  BLOCK_STRIDE, BLOCK_SIZE, TILE_KEYS, HEAD_SIZE, PADDED_HEAD, True)  # fmt: skip
    pages = read_pages(table_ptr, begin + TILE_KEYS, end, BLOCK_SIZE, TILE_KEYS)
    if OVERLAPS:
        gdc_wait()
    q = tl.load(q_ptr + dims[None, :], mask=mask, other=0.0)
    q_partner = tl.load(q_ptr + partners[None, :], mask=mask, other=0.0)
    q = tl.trans(turned(q, q_partner, q_norm, q_norm_partner, cos, sin, eps, HEAD_SIZE, HAS_NORM))
    acc = tl.zeros([PADDED_HEAD, PADDED_GROUP], tl.float32)
    top = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    segment_end = begin + size
    for key_start in tl.range(begin, end, TILE_KEYS, num_stages=1):
        acc, top, total = attend_tile(q, k, v, key_start + keys < end, acc, top, total, scale_log2)
        k = read_tile(k_ptr, pages, key_start + TILE_KEYS, end,
                      BLOCK_STRIDE, BLOCK_SIZE, TILE_KEYS, HEAD_SIZE, PADDED_HEAD, True)  # fmt: skip
        v = read_tile(v_ptr, pages, key_start + TILE_KEYS, end,
                      BLOCK_STRIDE, BLOCK_SIZE, TILE_KEYS, HEAD_SIZE, PADDED_HEAD, True)  # fmt: skip
        pages = read_pages(table_ptr, key_start + 2 * TILE_KEYS, end, BLOCK_SIZE, TILE_KEYS)
        if key_start + TILE_KEYS >= tl.minimum(segment_end, end):
            parts = heads * (MAX_SEGMENTS + 1) + 1 + segment
            tl.store(acc_ptr + parts[:, None] * HEAD_SIZE + dims[None, :], tl.trans(acc), mask=mask)
            tl.store(top_ptr + parts, top, mask=group < GROUP)
            tl.store(total_ptr + parts, total, mask=group < GROUP)
            segment += 1
            segment_end += size
            acc = tl.zeros([PADDED_HEAD, PADDED_GROUP], tl.float32)
            top = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
            total = tl.zeros([PADDED_GROUP], tl.float32)


def choose_programs(num_programs: int, num_multiprocessors: int) -> int:
    """Programs that share a row, if one for each row and key head made `num_programs`.

    One where those occupy most of the GPU: merging costs more than a few idle multiprocessors. Else two for each.
    """
    return 1 if 3 * num_programs >= 2 * num_multiprocessors else triton.cdiv(2 * num_multiprocessors, num_programs)


def fused_decode(
    qkv_TC: Tensor,
    *,
    cos_sin_EH: Tensor,
    slots_T: Tensor,
    kv_2BKPH: Tensor,
    q_norm_H: Tensor | None,
    k_norm_H: Tensor | None,
    eps: float,
    num_heads: int,
    block_tables_SM: Tensor,
    rows_R: Tensor,
    context_lens_R: Tensor,
    scale: float,
    max_context_len: int,
) -> Tensor:
    """`rotary_and_store` and `attention` for rows of one token each, in order -> [T, N, H].

    A row depends on nothing but itself; `max_context_len` bounds the contexts and changes no bit.
    """
    num_rows, device = qkv_TC.shape[0], qkv_TC.device
    _, _, num_kv_heads, block_size, head_size = kv_2BKPH.shape
    constants = head_constants(num_heads, head_size)
    segments = segment_constants(num_kv_heads, head_size, kv_2BKPH.dtype)
    segments["MIN_SEGMENT"] = segments["TILE_KEYS"]  # the first tile is all that is asked for before the wait
    most, overlaps = segments["MAX_SEGMENTS"], can_overlap(device)
    shares = choose_programs(num_rows * num_kv_heads, num_multiprocessors(device))
    shares = min(shares, most, triton.cdiv(max_context_len, segments["MIN_SEGMENT"]))
    parts = Parts.empty((num_rows, num_heads, 1 + most, head_size), device)
    out_TNH = qkv_TC.new_empty(num_rows, num_heads, head_size)
    has_norm = q_norm_H is not None and k_norm_H is not None
    fused_decode_kernel[(num_kv_heads, 1 + shares, num_rows)](
        qkv_TC, q_norm_H if has_norm else qkv_TC, k_norm_H if has_norm else qkv_TC, cos_sin_EH, slots_T,
        kv_2BKPH[0], kv_2BKPH[1], *parts, block_tables_SM, rows_R, context_lens_R, scale * LOG2_E, eps,
        block_tables_SM.stride(0), **constants, **segments, NUM_KV_HEADS=num_kv_heads,
        PADDED_GROUP=max(16, triton.next_power_of_2(num_heads // num_kv_heads)), BLOCK_SIZE=block_size,
        HAS_NORM=has_norm, OVERLAPS=overlaps,
        num_warps=max(1, segments["TILE_KEYS"] * constants["PADDED_HEAD"] // 2048),
        **({"launch_pdl": True} if overlaps else {}),
    )  # fmt: skip
    merge_parts(parts, out_TNH, context_lens_R, segments, None)
    return out_TNH
