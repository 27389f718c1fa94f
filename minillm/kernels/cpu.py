"""The kernel set for a CPU: plain torch calls, few per layer, no compiler. It knows tensors only, never a batch.

Weights are packed once for the matrix library at hand (`cpu_linear`); attention copies one row's pages at a time, so
that keys and values are still in cache when they are read. Contract and shape letters: `minillm.kernels`.
Also here: g rows of one context length, c context length, n queries, X pages, Y elements of a page.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.kernels.cpu_linear import PackedWeight, linear, pack_linear
from minillm.kernels.edits_reference import edit_logits, keep_edited, note_inputs
from minillm.kernels.sampling_reference import gumbel_noise, keep_mask, keep_tokens
from minillm.kernels.scores_reference import score_tokens
from minillm.kernels.step_inputs import expand_step_inputs

__all__ = [
    "PackedWeight",
    "add_rms_norm",
    "attention",
    "default_dtype",
    "edit_logits",
    "expand_step_inputs",
    "gated_linear",
    "keep_edited",
    "keep_tokens",
    "linear",
    "note_inputs",
    "pack_linear",
    "prepare_step",
    "rms_norm",
    "rotary_and_store",
    "sample",
    "score_tokens",
    "silu_mul",
]

MAX_GATHERED_BYTES = 1 << 20  # keys and values of the decode rows that are copied together
MAX_MASK = 1 << 20  # entries of a causal mask: 4 MB in fp32
MAX_EXCHANGED = 16  # tokens whose heads' halves are exchanged by a copy: half the calls; of many it costs more
MAX_QUERY_TILE = 128
MAX_BLOCK_TOKENS = 512  # queries of a tile that a caller may ask for
MAX_ROW_BYTES = 32 << 20  # keys and values of a row with several queries that are copied together
MAX_NOISE = 16.7  # above every value of `gumbel_noise`
FIRST_CANDIDATES = 256  # likeliest tokens looked at first for top_p or min_p alone


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (Zhang and Sennrich 2019) over the last dimension, computed in fp32 -> y_TD."""
    return torch.rms_norm(x_TD, weight_D.shape, weight_D, eps)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """residual += x in place; the norm of the sum -> y_TD."""
    return torch.rms_norm(residual_TD.add_(x_TD), weight_D.shape, weight_D, eps)


def silu_mul(x_T2F: Tensor) -> Tensor:
    """silu(first half) * second half -> y_TF."""
    gate_TF, up_TF = x_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF).mul_(up_TF)


def gated_linear(x_TD: Tensor, weight_2FD: PackedWeight | Tensor, bias_2F: Tensor | None) -> Tensor:
    """silu(first half) * second half of x W^T + b -> y_TF."""
    return silu_mul(linear(x_TD, weight_2FD, bias_2F))


class Turns(NamedTuple):
    """How a step's tokens are rotated and where their keys and values go."""

    cos_T1H: Tensor
    """Of both halves of a head."""
    sin_T1H: Tensor
    """Negative for the first half, which takes from the second: x * cos + (its halves exchanged) * sin."""
    places: tuple[Tensor, Tensor]
    """Block, and slot in it."""


class Run(NamedTuple):
    """Rows of one context length that are attended to together: their queries are tokens [first, last)."""

    num_rows: int
    first: int
    last: int
    context: int
    pages_X: Tensor
    """Pages of one layer's cache: row by row, its keys head by head, then its values."""


class PreparedStep(NamedTuple):
    """What all layers of a step share."""

    turns: Turns
    runs: list[Run]


def prepare_step(
    *,
    cos_sin_EH: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    kv_2BKPH: Tensor,
    block_tables_SM: Tensor,
    rows_R: Tensor,
    query_starts_R1: Tensor,
    context_lens_R: Tensor,
    num_decodes: int,
    max_context_len: int,
) -> PreparedStep:
    """What `rotary_and_store` and `attention` need in every layer of a step alike; reads no keys or values."""
    turns = make_turns(cos_sin_EH, positions_T, slots_T, kv_2BKPH.shape[3])
    tables_RM = block_tables_SM[:, : -(-max_context_len // kv_2BKPH.shape[3])].index_select(0, rows_R)
    return PreparedStep(turns, make_runs(kv_2BKPH, tables_RM, query_starts_R1, context_lens_R, num_decodes))


def make_turns(cos_sin_EH: Tensor, positions_T: Tensor, slots_T: Tensor, block_size: int) -> Turns:
    """Rows of the rotary table, and places in the cache."""
    cos_T1h, sin_T1h = cos_sin_EH.index_select(0, positions_T).unsqueeze(1).chunk(2, dim=-1)
    cos_T1H, sin_T1H = torch.cat((cos_T1h, cos_T1h), dim=-1), torch.cat((-sin_T1h, sin_T1h), dim=-1)
    return Turns(cos_T1H, sin_T1H, (slots_T // block_size, slots_T % block_size))


def make_runs(
    kv_2BKPH: Tensor, tables_RM: Tensor, query_starts_R1: Tensor, context_lens_R: Tensor, num_decodes: int
) -> list[Run]:
    """Decodes of one context length whose keys and values stay in cache together, then every other row alone."""
    num_blocks, num_kv_heads, block_size, head_size = kv_2BKPH.shape[1:]
    contexts, starts = context_lens_R.tolist(), query_starts_R1.tolist()
    # A page is one head's keys, or values, of one block: contiguous. Numbers of all pages of all rows, in one go.
    num_pages = 2 * num_blocks * num_kv_heads
    heads_2K = torch.arange(0, num_pages, num_blocks * num_kv_heads).unsqueeze(1) + torch.arange(num_kv_heads)
    tables_R2KM = heads_2K.unsqueeze(2) + (tables_RM * num_kv_heads).view(len(contexts), 1, 1, -1)
    bounds = list(alike(contexts[:num_decodes], 2 * num_kv_heads * head_size * kv_2BKPH.element_size()))
    bounds += [(row, row + 1) for row in range(num_decodes, len(contexts))]
    runs = []
    for first, last in bounds:
        pages_X = tables_R2KM[first:last, ..., : -(-contexts[first] // block_size)].reshape(-1)
        runs.append(Run(last - first, starts[first], starts[last], contexts[first], pages_X))
    return runs


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
    prepared: PreparedStep | None = None,
) -> Tensor:
    """Norm q and k per head if weights are given, rotate both in fp32, store k and v -> q_TNH (a view)."""
    block_size, head_size = kv_2BKPH.shape[3:]
    turns = make_turns(cos_sin_EH, positions_T, slots_T, block_size) if prepared is None else prepared.turns
    num_tokens, num_rotated, half = qkv_TC.shape[0], num_heads + num_kv_heads, head_size // 2
    in_TXH = qkv_TC.view(num_tokens, num_rotated + num_kv_heads, head_size)
    if q_norm_H is not None and k_norm_H is not None:
        q_TNH, k_TKH, v_TKH = in_TXH.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        q_TNH = torch.rms_norm(q_TNH, q_norm_H.shape, q_norm_H, eps)
        in_TXH = torch.cat((q_TNH, torch.rms_norm(k_TKH, k_norm_H.shape, k_norm_H, eps), v_TKH), dim=1)
    in_TXH = in_TXH.to(cos_sin_EH.dtype)
    if num_tokens <= MAX_EXCHANGED:
        out_TXH = in_TXH.clone()
        turned_TXH = out_TXH[:, :num_rotated]
        exchanged_TXH = turned_TXH.roll(half, dims=-1)
        turned_TXH.mul_(turns.cos_T1H).addcmul_(exchanged_TXH, turns.sin_T1H)
    else:
        out_TXH = torch.empty_like(in_TXH)
        low_TXh, high_TXh = in_TXH[:, :num_rotated].chunk(2, dim=-1)
        cos_T1h, sin_T1h = turns.cos_T1H[..., half:], turns.sin_T1H[..., half:]
        torch.mul(low_TXh, cos_T1h, out=out_TXH[:, :num_rotated, :half]).addcmul_(high_TXh, sin_T1h, value=-1.0)
        torch.mul(high_TXh, cos_T1h, out=out_TXH[:, :num_rotated, half:]).addcmul_(low_TXh, sin_T1h)
        out_TXH[:, num_rotated:] = in_TXH[:, num_rotated:]
    out_TXH = out_TXH.to(qkv_TC.dtype)
    # [keys or values, block, kv head, slot, head size] seen as [block, slot, keys or values, kv head, head size]
    kv_T2KH = out_TXH[:, num_heads:].view(num_tokens, 2, num_kv_heads, head_size)
    kv_2BKPH.permute(1, 3, 0, 2, 4).index_put_(turns.places, kv_T2KH)
    return out_TXH[:, :num_heads]


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
    prepared: PreparedStep | None = None,
) -> Tensor:
    """Causal attention over the paged cache, row by row -> o_TNH. `one_launch` changes nothing here.

    A row's result has the same bits whatever rows are beside it. `block_tokens` sets the queries of a tile of rows with
    several (a power of two; None: measured default); ValueError if it is none or too large.
    """
    check_block_tokens(block_tokens)
    if prepared is None:
        tables_RM = block_tables_SM[:, : -(-max_context_len // kv_2BKPH.shape[3])].index_select(0, rows_R)
        runs = make_runs(kv_2BKPH, tables_RM, query_starts_R1, context_lens_R, num_decodes)
    else:
        runs = prepared.runs
    out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype)
    num_kv_heads, block_size, head_size = kv_2BKPH.shape[2:]
    group = q_TNH.shape[1] // num_kv_heads
    pages_XY = kv_2BKPH.view(-1, block_size * head_size)
    for run in runs:
        q_XNH, out_XNH = q_TNH[run.first : run.last], out_TNH[run.first : run.last]
        pages_g2KM = run.pages_X.view(run.num_rows, 2, num_kv_heads, -1)
        if run.last - run.first == run.num_rows:
            kv_g2KcH = gather(pages_XY, pages_g2KM, run.context, head_size)
            # The queries of a key/value head's group are like queries of one head.
            q_gKnH = q_XNH.view(run.num_rows, num_kv_heads, -1, head_size)
            o_gKnH = F.scaled_dot_product_attention(q_gKnH, kv_g2KcH[:, 0], kv_g2KcH[:, 1], scale=scale)
            out_XNH.view(q_gKnH.shape).copy_(o_gKnH)
            continue
        # A long context is copied some heads at a time: the memory of a chunk does not grow with it.
        step = max(1, MAX_ROW_BYTES // (2 * run.context * head_size * kv_2BKPH.element_size()))
        for first in range(0, num_kv_heads, step):
            heads = slice(first * group, (first + step) * group)
            copied = gather(pages_XY, pages_g2KM[:, :, first : first + step], run.context, head_size)
            attend_chunk(q_XNH[:, heads], copied[0], scale, block_tokens, out_XNH[:, heads])
            del copied  # before the next one is made
    return out_TNH


def gather(pages_XY: Tensor, pages_g2KM: Tensor, context: int, head_size: int) -> Tensor:
    """Copy rows' pages together, which are then still in cache when they are read -> kv_g2KcH, a view."""
    kv_XY = pages_XY.index_select(0, pages_g2KM.reshape(-1))
    return kv_XY.view(*pages_g2KM.shape[:3], -1, head_size)[:, :, :, :context]


def check_block_tokens(block_tokens: int | None) -> None:
    """Raise ValueError unless this can be the number of queries of a tile."""
    if block_tokens is None:
        return
    if block_tokens < 16 or block_tokens & (block_tokens - 1):
        raise ValueError(f"block_tokens must be a power of two of at least 16, not {block_tokens}")
    if block_tokens > MAX_BLOCK_TOKENS:
        raise ValueError(f"block_tokens={block_tokens} does not fit: the largest that does is {MAX_BLOCK_TOKENS}")


def alike(contexts: list[int], bytes_per_token: int) -> Iterator[tuple[int, int]]:
    """Runs [first, last) of rows with one context length whose keys and values stay in cache together."""
    first = 0
    while first < len(contexts):
        limit = first + max(1, MAX_GATHERED_BYTES // (contexts[first] * bytes_per_token))
        last = first + 1
        while last < min(limit, len(contexts)) and contexts[last] == contexts[first]:
            last += 1
        yield first, last
        first = last


def attend_chunk(q_nNH: Tensor, kv_2KcH: Tensor, scale: float, block_tokens: int | None, out_nNH: Tensor) -> None:
    """Attention of a row with several queries, tile by tile of them, into `out_nNH`.

    keys     0 ........... c - n ... c        tile [i, j) of the queries reads keys [0, c - n + j)
    queries                0 ....... n        and needs a mask on its last j - i columns only
    """
    num_queries, num_heads, head_size = q_nNH.shape
    _, num_kv_heads, context, _ = kv_2KcH.shape
    group = num_heads // num_kv_heads
    tile = block_tokens or max(16, min(MAX_QUERY_TILE, MAX_MASK // context))
    # One batch entry per key/value head; its queries' heads share keys and values without a copy.
    q_KGnH = q_nNH.view(num_queries, num_kv_heads, group, head_size).permute(1, 2, 0, 3)
    out_KGnH = out_nNH.view(num_queries, num_kv_heads, group, head_size).permute(1, 2, 0, 3)
    for i in range(0, num_queries, tile):
        j = min(i + tile, num_queries)
        visible = context - num_queries + j
        mask_nc = torch.ones((j - i, visible), dtype=torch.bool).tril_(visible - (j - i))
        k_KGcH, v_KGcH = kv_2KcH[:, :, None, :visible].expand(-1, -1, group, -1, -1)
        out_KGnH[:, :, i:j] = F.scaled_dot_product_attention(
            q_KGnH[:, :, i:j], k_KGcH, v_KGcH, attn_mask=mask_nc, scale=scale
        )


def sample(
    logits_LV: Tensor,
    *,
    temperature_L: Tensor,
    top_k_L: Tensor,
    top_p_L: Tensor,
    min_p_L: Tensor,
    seeds_L: Tensor,
    positions_L: Tensor,
    is_random: bool = True,
    is_filtered: bool = True,
) -> tuple[Tensor, Tensor]:
    """`sampling_reference.sample`, where a row pays only for what it asks: noise and filters see few of its tokens."""
    best_L, tokens_L = logits_LV.max(dim=-1)
    is_finite_L = best_L.isfinite()
    tokens_L = tokens_L.masked_fill_(~is_finite_L, 0)
    if is_random:
        params = zip(temperature_L.tolist(), top_k_L.tolist(), top_p_L.tolist(), min_p_L.tolist(), strict=True)
        for row, (is_finite, (temperature, *filters)) in enumerate(zip(is_finite_L.tolist(), params, strict=True)):
            if not is_finite or temperature <= 0:
                continue
            scores_V = logits_LV[row].float() / temperature
            seed_1, position_1 = seeds_L[row : row + 1], positions_L[row : row + 1]
            top_k, top_p, min_p = filters
            if is_filtered and (0 < top_k < logits_LV.shape[1] or top_p < 1.0 or min_p > 0.0):
                ids_X = kept_tokens(scores_V, top_k, top_p, min_p)
            else:
                ids_X = contenders(scores_V, tokens_L[row : row + 1], seed_1, position_1)
            noisy_X = scores_V[ids_X] + gumbel_noise(seed_1, position_1, ids_X)[0]
            tokens_L[row] = ids_X[noisy_X.argmax()]
    return tokens_L.int(), is_finite_L


def contenders(scores_V: Tensor, best_1: Tensor, seed_1: Tensor, position_1: Tensor) -> Tensor:
    """Ids, ascending, of the tokens that can win: the largest noise would not take any other past the likeliest one."""
    best = scores_V[best_1]
    bound_1 = best + gumbel_noise(seed_1, position_1, best_1)[0] - MAX_NOISE - 1e-5 * best.abs()
    return (scores_V >= bound_1).nonzero().flatten()


def kept_tokens(scores_V: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Ids, ascending, of the tokens that `keep_mask` keeps; sorts only the likeliest of them."""
    vocab_size = scores_V.shape[0]
    weights_V = (scores_V - scores_V.max()).exp_()
    is_in_k = 0 < top_k < vocab_size
    total = weights_V.sum(dtype=torch.float64).item()
    num = top_k if is_in_k else min(FIRST_CANDIDATES, vocab_size)
    while True:
        ids_X = (scores_V >= scores_V.topk(num).values[-1]).nonzero().flatten()
        mass = weights_V[ids_X].sum(dtype=torch.float64).item()
        is_enough = mass > top_p * total if top_p < 1.0 else bool(weights_V[ids_X].min() < min_p)
        if is_in_k or is_enough or num == vocab_size:
            break
        num = min(16 * num, vocab_size)
    # Top_p of the whole row is a larger share of the part that was looked at.
    share = top_p if is_in_k or top_p >= 1.0 else min(top_p * total / mass, 1.0)
    off_1, share_1, min_p_1 = torch.zeros(1), torch.tensor([share], dtype=torch.float64), torch.tensor([min_p])
    return ids_X[keep_mask(scores_V[ids_X][None], off_1, share_1, min_p_1)[0]]


def default_dtype() -> torch.dtype:
    """What "auto" is on a CPU: bf16 where the CPU multiplies it in matrix units (AMX), else fp32.

    Without them, measured on SmolLM2-135M, bf16 decodes 1.1 to 1.3 times as fast as fp32 but reads prompts 0.8 times
    as fast. Either way few rows are multiplied by a file's codes, if it has some and they are kept.
    """
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
