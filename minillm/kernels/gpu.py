"""The GPU kernel set: Triton behind the contract of the package, and standard attention for what Triton lacks.

What a kernel cannot do (a dtype, a head size, a tensor in main memory) goes to `reference` with one warning that
says so. The only module by which the engine reaches Triton.

Shapes: T tokens, D hidden size, F intermediate size, N query heads, K key/value heads, H head size, C = (N + 2K) * H,
R rows, S seats, M blocks a seat can hold, B blocks, P block size, O output features, E entries of a rotary table.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from minillm.kernels import fused, reference
from minillm.kernels.attention import num_multiprocessors, paged_attention
from minillm.kernels.dealing import Deal, deal
from minillm.kernels.decode_attention import decode_attention
from minillm.kernels.edits import edit_logits, keep_edited, note_inputs
from minillm.kernels.expand_kernel import expand_step_inputs
from minillm.kernels.fused_decode import fused_decode
from minillm.kernels.sampling import keep_tokens, sample
from minillm.kernels.scores import score_tokens
from minillm.kernels.skinny import add_linear, max_fused_rows, norm_gated_linear, norm_linear

__all__ = [
    "add_linear",
    "add_rms_norm",
    "attention",
    "edit_logits",
    "expand_step_inputs",
    "fused_decode",
    "gated_linear",
    "keep_edited",
    "keep_tokens",
    "linear",
    "linear_into",
    "max_fused_rows",
    "norm_gated_linear",
    "norm_linear",
    "note_inputs",
    "prepare_step",
    "rms_norm",
    "rotary_and_store",
    "sample",
    "score_tokens",
    "silu_mul",
]

HALF_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (*HALF_DTYPES, torch.float32)
MAX_HEAD_SIZE = 256
MAX_STREAMED_ROWS = 64
"""Most tokens of a step whose products `hopper_linear` computes; of 128 others are faster."""
HOPPER_TRITON = ("3.6.",)
"""Versions of Triton with which the Hopper kernels were tested, on a GPU of compute capability 9.0; Gluon's language is
not stable."""


class PreparedStep(NamedTuple):
    """What all layers of a step share."""

    dealt: Deal | None
    """How decodes' keys are dealt to programs; None where there are no decodes."""
    counts_T1: Tensor | None
    """What `hopper_attention` counts in; None in a step of decodes alone."""


def is_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, which takes tensors in main memory."""
    return bool(triton.knobs.runtime.interpret)


@cache
def warn_once(reason: str) -> None:
    """Say what falls back: once for each reason."""
    warnings.warn(f"{reason}: falling back to plain PyTorch, which is much slower", RuntimeWarning, stacklevel=4)


def is_supported(x: Tensor, head_size: int = 2) -> bool:
    """Whether the Triton kernels take this dtype, device and head size; warns the first time that they do not."""
    if x.dtype not in DTYPES:
        warn_once(f"the Triton kernels do not take {x.dtype}, only bfloat16, float16 and float32")
    elif not x.is_cuda and not is_interpreted():
        warn_once(f"the Triton kernels do not take tensors on {x.device.type}")
    elif head_size % 2 or head_size > MAX_HEAD_SIZE:
        warn_once(f"the Triton kernels do not take a head size of {head_size}, only even ones up to {MAX_HEAD_SIZE}")
    else:
        return True
    return False


@cache
def has_hopper_kernel(device: torch.device) -> bool:
    """Whether the Hopper kernels were tested with this GPU and this Triton."""
    if device.type != "cuda" or not triton.__version__.startswith(HOPPER_TRITON):
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def suits_hopper_kernel(q_TNH: Tensor, kv_2BKPH: Tensor) -> bool:
    """Whether `hopper_attention` takes these shapes, and is the faster one for them; lengths play no part."""
    num_heads, head_size = q_TNH.shape[1:]
    num_kv_heads, block_size = kv_2BKPH.shape[2:4]
    group = num_heads // num_kv_heads
    padded_group = triton.next_power_of_2(group)
    return (
        q_TNH.dtype in HALF_DTYPES
        and head_size in (64, 128)
        and block_size in (16, 32, 64, 128)
        and padded_group <= 64
        and 8 * group >= 7 * padded_group  # of a group of three a quarter of the work would be padding
    )


def streamed(x_TD: Tensor, num_out: int, **kind: bool) -> Any:
    """`hopper_linear`'s tile for this product, or None where cuBLAS is the one that is there, or the faster one."""
    is_half = x_TD.dtype in HALF_DTYPES
    if not 1 <= x_TD.shape[0] <= MAX_STREAMED_ROWS or not is_half or not has_hopper_kernel(x_TD.device):
        return None
    from minillm.kernels.hopper_linear import choose_tile

    return choose_tile(x_TD.shape[1], num_out, **kind)


def suits_hopper_gated(x_TD: Tensor, num_out: int) -> bool:
    """Whether `hopper_gated` takes this product, of more rows than `hopper_linear` does, and is the faster one."""
    num_tokens, num_in = x_TD.shape
    is_half = x_TD.dtype in HALF_DTYPES
    is_whole = num_in % 8 == 0 and num_out % 8 == 0  # the copy engine takes rows of whole 16 bytes
    if num_tokens <= MAX_STREAMED_ROWS or not is_half or not is_whole or not has_hopper_kernel(x_TD.device):
        return False
    from minillm.kernels.hopper_gated import is_faster

    return is_faster(num_tokens, num_out, num_multiprocessors(x_TD.device))


def linear(x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b -> [T, O]."""
    tile = streamed(x_TD, weight_OD.shape[0])
    if tile is None:
        return torch.nn.functional.linear(x_TD, weight_OD, bias_O)
    from minillm.kernels import hopper_linear

    return hopper_linear.linear(x_TD, weight_OD, bias_O, tile)


def gated_linear(x_TD: Tensor, weight_2FD: Tensor, bias_2F: Tensor | None) -> Tensor:
    """silu(first half) * second half of x W^T + b -> [T, F]."""
    num_out = weight_2FD.shape[0] // 2
    tile = streamed(x_TD, num_out, is_gated=True)
    if tile is not None:
        from minillm.kernels import hopper_linear

        return hopper_linear.gated_linear(x_TD, weight_2FD, bias_2F, tile)
    if bias_2F is None and suits_hopper_gated(x_TD, num_out):
        from minillm.kernels import hopper_gated

        return hopper_gated.gated_linear(x_TD, weight_2FD)
    return silu_mul(linear(x_TD, weight_2FD, bias_2F))


def linear_into(residual_TO: Tensor, x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor | None:
    """residual += x W^T + b in place and None, or what `add_rms_norm` is still to add: y [T, O], or float32 parts of it
    [S, T, O].

    For many rows the product adds as it stores: the norm then reads and writes half as much.
    """
    is_half = x_TD.dtype in HALF_DTYPES
    if len(x_TD) > MAX_STREAMED_ROWS and bias_O is None and is_half:
        residual_TO.addmm_(x_TD, weight_OD.t())
        return None
    tile = streamed(x_TD, weight_OD.shape[0], is_shared=True)
    if tile is None:
        return linear(x_TD, weight_OD, bias_O)
    from minillm.kernels import hopper_linear

    return hopper_linear.linear_parts(x_TD, weight_OD, bias_O, tile)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm -> [T, D]."""
    norm = fused.rms_norm if is_supported(x_TD) else reference.rms_norm
    return norm(x_TD, weight_D, eps)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """residual += x, or the sum of its parts [S, T, D], in place, then rms_norm(residual) -> [T, D]."""
    if x_TD.ndim == 3:
        from minillm.kernels.hopper_linear import sum_norm

        return sum_norm(x_TD, residual_TD, weight_D, eps)
    norm = fused.add_rms_norm if is_supported(x_TD) else reference.add_rms_norm
    return norm(x_TD, residual_TD, weight_D, eps)


def silu_mul(x_T2F: Tensor) -> Tensor:
    """silu(first half) * second half -> [T, F]."""
    mul = fused.silu_mul if is_supported(x_T2F) else reference.silu_mul
    return mul(x_T2F)


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
    """Normalise q and k if weights are given, rotate them, write k and v to the cache -> rotated q [T, N, H]."""
    is_fused = is_supported(qkv_TC, kv_2BKPH.shape[-1])
    store = fused.rotary_and_store if is_fused else reference.rotary_and_store
    return store(
        qkv_TC,
        cos_sin_EH=cos_sin_EH,
        positions_T=positions_T,
        slots_T=slots_T,
        kv_2BKPH=kv_2BKPH,
        q_norm_H=q_norm_H,
        k_norm_H=k_norm_H,
        eps=eps,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
    )


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
    """What `attention` needs in every layer alike; reads no keys or values."""
    dealt = None
    if num_decodes and is_supported(kv_2BKPH, kv_2BKPH.shape[-1]):
        dealt = deal(
            kv_2BKPH,
            rows_R=rows_R,
            query_starts_R1=query_starts_R1,
            context_lens_R=context_lens_R,
            num_tokens=len(positions_T),
            num_decodes=num_decodes,
        )
    has_prompts = len(positions_T) != num_decodes
    counts_T1 = torch.zeros(len(positions_T) + 1, dtype=torch.int32, device=kv_2BKPH.device) if has_prompts else None
    return PreparedStep(dealt, counts_T1)


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
    """Causal attention over the paged cache -> [T, N, H]; tokens that no row owns (padding) are left unwritten.

    Rows of one token, all among the first `num_decodes`, go to the split-KV kernel and the others to Flash Attention,
    or all rows to the latter with `one_launch`. `block_tokens` sets the keys of Flash Attention's tile (a power of two;
    None: measured default) and raises ValueError, naming the largest that does, where it does not fit shared memory.
    With either the plain Triton kernel is taken also on a Hopper GPU, which else has its own.
    """
    rows: dict[str, Any] = {
        "rows_R": rows_R,
        "query_starts_R1": query_starts_R1,
        "context_lens_R": context_lens_R,
    }
    keys = {"kv_2BKPH": kv_2BKPH, "block_tables_SM": block_tables_SM, "scale": scale, **rows}
    if not is_supported(q_TNH, q_TNH.shape[-1]):
        keys |= {"max_query_len": max_query_len, "max_context_len": max_context_len}
        return reference.attention(q_TNH, num_decodes=num_decodes, **keys)
    q_TNH = q_TNH.contiguous()
    out_TNH = torch.empty_like(q_TNH)
    if num_decodes and not one_launch:
        dealt = None if prepared is None else prepared.dealt
        overlaps = dealt is not None
        if dealt is None:
            dealt = deal(kv_2BKPH, **rows, num_tokens=len(q_TNH), num_decodes=num_decodes)
        decode_attention(
            q_TNH,
            out_TNH,
            dealt,
            kv_2BKPH=kv_2BKPH,
            block_tables_SM=block_tables_SM,
            context_lens_R=context_lens_R,
            scale=scale,
            overlaps=overlaps,
        )
    if max_query_len > 1 or one_launch:
        is_own_choice = block_tokens is None and not one_launch
        if is_own_choice and has_hopper_kernel(q_TNH.device) and suits_hopper_kernel(q_TNH, kv_2BKPH):
            from minillm.kernels.hopper_attention import hopper_attention

            counts_T1 = None if prepared is None else prepared.counts_T1
            hopper_attention(q_TNH, out_TNH, min_queries=2, counts_T1=counts_T1, **keys)
        else:
            paged_attention(q_TNH, out_TNH, min_queries=1 if one_launch else 2, block_tokens=block_tokens, **keys)
    return out_TNH
