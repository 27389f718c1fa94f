"""Products of up to 64 rows with a matrix, whose weights are on their way before the rows are: Gluon, for Hopper GPUs.

    time ->   | kernel before: sums, norm, attention ...... |
              | all weights of a program -> shared memory ..| rows, tile by tile -> tensor cores | store |

Before the wait for the kernel before it (programmatic dependent launch) a program asks the copy engine (TMA) for all
its weights; after it, for the rows, some tiles ahead of the products. Where outputs are few, several programs share
them, each with a part of the inputs; the norm that comes next adds the parts, in order. It knows no layers.

Shapes: T tokens (up to 64), D inputs, O outputs, F gated outputs, S parts of the inputs.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
# (Triton and Gluon functions have no types that Python knows)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minillm.kernels.decode_attention import can_overlap
from minillm.kernels.hopper_layouts import shared_layout, sums_layout

__all__ = ["Tile", "choose_tile", "gated_linear", "linear", "linear_parts", "silu", "sum_norm"]

ROWS = gl.constexpr(64)
"""Rows of a program: what one instruction of four warps multiplies."""
MIN_PROGRAMS = 96
"""Fewer leave the memory of a GPU idle."""


class Tile(NamedTuple):
    """The share of a product that one program has, and how it is fetched."""

    outputs: int
    """Of a gated product: as many gates and as many ups."""
    parts: int
    inputs: int
    """Per turn."""
    depth: int
    """Tiles of rows in shared memory: two at least, unless there is but one."""


def choose_tile(num_in: int, num_out: int, is_gated: bool = False, is_shared: bool = False) -> Tile | None:
    """The measured best (H100, sizes of qwen3-0.6b), or None for larger sizes, where cuBLAS may be faster.

    `is_gated`: outputs are pairs. `is_shared`: programs may share outputs, for products of a small size.
    """
    if is_shared:
        tile, max_in, max_out = Tile(32, 4, 128, 6), 3072, 1024
    else:
        tile, max_in, max_out = Tile(16, 1, 128, 3) if is_gated else Tile(32, 1, 128, 4), 1024, 4096
    num_programs = triton.cdiv(num_out, tile.outputs) * tile.parts
    is_measured = num_in <= max_in and num_out <= max_out and num_programs >= MIN_PROGRAMS
    return tile if is_measured and num_in % 8 == 0 else None  # the copy engine takes rows of whole 16 bytes


@triton.constexpr_function
def stored_layout(outputs):
    """[64, outputs] over four warps, eight outputs to a thread."""
    lanes = outputs // 8
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def make_barriers(NUM: gl.constexpr):
    """Barriers that one copy each completes."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


@gluon.jit
def stored_bias(bias_ptr, first, NUM_OUT: gl.constexpr, TILE_OUT: gl.constexpr):
    """Bias [TILE_OUT] of outputs from `first` on, in float32."""
    outs = first + gl.arange(0, TILE_OUT, gl.SliceLayout(0, stored_layout(TILE_OUT)))
    return gl.load(bias_ptr + outs, mask=outs < NUM_OUT, other=0.0).to(gl.float32)


@gluon.jit
def silu(x):
    """x * sigmoid(x) in float32; far below zero the exponential is infinite and the quotient zero, as it should be."""
    return x / (1.0 + gl.exp(-x))


@gluon.jit(do_not_specialize=["num_rows"])
def stream_kernel(
    rows, weights, bias_ptr, y_ptr, num_rows,
    NUM_IN: gl.constexpr, NUM_OUT: gl.constexpr, PARTS: gl.constexpr, TILE_IN: gl.constexpr, TILE_OUT: gl.constexpr,
    DEPTH: gl.constexpr, IS_GATED: gl.constexpr, HAS_BIAS: gl.constexpr, OVERLAPS: gl.constexpr,
):  # fmt: skip
    """Grid (tiles of outputs, parts, tiles of rows). Writes y [T, O], or with several parts float32 sums [S, T, O]."""
    NUM_TILES: gl.constexpr = (NUM_IN + PARTS * TILE_IN - 1) // (PARTS * TILE_IN)
    NUM_AHEAD: gl.constexpr = min(max(DEPTH, 2), NUM_TILES)
    HALVES: gl.constexpr = 2 if IS_GATED else 1
    dtype: gl.constexpr = weights.dtype
    if OVERLAPS:
        gdc_launch_dependents()
    first_out = gl.program_id(0) * TILE_OUT
    first_in = gl.program_id(1) * (NUM_TILES * TILE_IN)
    first_row = gl.program_id(2) * ROWS
    own = gl.allocate_shared_memory(dtype, [NUM_TILES * HALVES, TILE_OUT, TILE_IN], weights.layout)
    ring = gl.allocate_shared_memory(dtype, [NUM_AHEAD, ROWS, TILE_IN], rows.layout)
    has_weights = make_barriers(NUM_TILES)
    has_rows = make_barriers(NUM_AHEAD)
    fence_async_shared()
    for tile in gl.static_range(NUM_TILES):
        mbarrier.expect(has_weights.index(tile), HALVES * TILE_OUT * TILE_IN * 2)
    for tile in gl.static_range(NUM_AHEAD):
        mbarrier.expect(has_rows.index(tile), ROWS * TILE_IN * 2)
    for tile in gl.static_range(NUM_TILES):
        for half in gl.static_range(HALVES):
            corner = [half * NUM_OUT + first_out, first_in + tile * TILE_IN]
            tma.async_copy_global_to_shared(weights, corner, has_weights.index(tile), own.index(tile * HALVES + half))
    if OVERLAPS:
        gdc_wait()
    for tile in gl.static_range(NUM_AHEAD):
        corner = [first_row, first_in + tile * TILE_IN]
        tma.async_copy_global_to_shared(rows, corner, has_rows.index(tile), ring.index(tile))
    layout: gl.constexpr = sums_layout(TILE_OUT)
    sums = gl.zeros([ROWS, TILE_OUT], gl.float32, layout)
    up_sums = gl.zeros([ROWS, TILE_OUT], gl.float32, layout)
    for tile in gl.static_range(NUM_TILES):
        mbarrier.wait(has_weights.index(tile), 0)
        mbarrier.wait(has_rows.index(tile % NUM_AHEAD), (tile // NUM_AHEAD) & 1)
        x = ring.index(tile % NUM_AHEAD)
        sums = warpgroup_mma(x, own.index(tile * HALVES).permute((1, 0)), sums, is_async=True)
        if IS_GATED:
            up_sums = warpgroup_mma(x, own.index(tile * HALVES + 1).permute((1, 0)), up_sums, is_async=True)
        if tile > 0 and tile - 1 + NUM_AHEAD < NUM_TILES:  # the tile before is done with: its place in the ring is free
            if IS_GATED:
                sums, up_sums = warpgroup_mma_wait(2, deps=[sums, up_sums])
            else:
                sums = warpgroup_mma_wait(1, deps=[sums])
            place = (tile - 1) % NUM_AHEAD
            mbarrier.expect(has_rows.index(place), ROWS * TILE_IN * 2)
            corner = [first_row, first_in + (tile - 1 + NUM_AHEAD) * TILE_IN]
            tma.async_copy_global_to_shared(rows, corner, has_rows.index(place), ring.index(place))
    if IS_GATED:
        sums, up_sums = warpgroup_mma_wait(0, deps=[sums, up_sums])
    else:
        sums = warpgroup_mma_wait(0, deps=[sums])
    stored: gl.constexpr = stored_layout(TILE_OUT)
    y = gl.convert_layout(sums, stored)
    if HAS_BIAS:
        y += gl.where(gl.program_id(1) == 0, stored_bias(bias_ptr, first_out, NUM_OUT, TILE_OUT), 0.0)[None, :]
    if IS_GATED:
        ups = gl.convert_layout(up_sums, stored)
        if HAS_BIAS:
            ups += stored_bias(bias_ptr + NUM_OUT, first_out, NUM_OUT, TILE_OUT)[None, :]
        y = silu(y) * ups
    tokens = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, stored))
    outs = first_out + gl.arange(0, TILE_OUT, gl.SliceLayout(0, stored))
    if PARTS > 1:
        y_ptr += gl.program_id(1) * num_rows * NUM_OUT
    is_own = (tokens < num_rows)[:, None] & (outs < NUM_OUT)[None, :]
    gl.store(y_ptr + tokens[:, None] * NUM_OUT + outs[None, :], y.to(y_ptr.dtype.element_ty), mask=is_own)


def launch(x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, y: Tensor, tile: Tile, is_gated: bool) -> Tensor:
    """The launch behind the three products."""
    x_TD = x_TD.contiguous()
    num_tokens, num_in = x_TD.shape
    num_out, overlaps = y.shape[-1], can_overlap(x_TD.device)
    layout = shared_layout(2)
    stream_kernel[(triton.cdiv(num_out, tile.outputs), tile.parts, triton.cdiv(num_tokens, ROWS.value))](
        TensorDescriptor.from_tensor(x_TD, [ROWS.value, tile.inputs], layout),
        TensorDescriptor.from_tensor(weight_OD, [tile.outputs, tile.inputs], layout),
        x_TD if bias_O is None else bias_O, y, num_tokens,
        NUM_IN=num_in, NUM_OUT=num_out, PARTS=tile.parts, TILE_IN=tile.inputs, TILE_OUT=tile.outputs,
        DEPTH=tile.depth, IS_GATED=is_gated, HAS_BIAS=bias_O is not None, OVERLAPS=overlaps, num_warps=4,
        **({"launch_pdl": True} if overlaps else {}),
    )  # fmt: skip
    return y


def linear(x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, tile: Tile) -> Tensor:
    """x W^T + b -> [T, O]."""
    y_TO = x_TD.new_empty(x_TD.shape[0], weight_OD.shape[0])
    return launch(x_TD, weight_OD, bias_O, y_TO, tile, False)


def gated_linear(x_TD: Tensor, weight_2FD: Tensor, bias_2F: Tensor | None, tile: Tile) -> Tensor:
    """silu(first half) * second half of x W^T + b -> [T, F]."""
    y_TF = x_TD.new_empty(x_TD.shape[0], weight_2FD.shape[0] // 2)
    return launch(x_TD, weight_2FD, bias_2F, y_TF, tile, True)


def linear_parts(x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, tile: Tile) -> Tensor:
    """Sums [S, T, O] in float32 whose sum is x W^T + b."""
    y_STO = torch.empty(tile.parts, x_TD.shape[0], weight_OD.shape[0], dtype=torch.float32, device=x_TD.device)
    return launch(x_TD, weight_OD, bias_O, y_STO, tile, False)


@triton.jit
def sum_norm_kernel(
    parts_ptr, residual_ptr, weight_ptr, y_ptr, eps, part_stride,
    SIZE: tl.constexpr, PADDED: tl.constexpr, NUM_PARTS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One token per program: residual += the parts, one after the other; y is its norm."""
    if OVERLAPS:
        gdc_launch_dependents()
    dims = tl.arange(0, PADDED)
    mask = dims < SIZE
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + dims, mask=mask, other=0.0).to(tl.float32)
    offsets = tl.program_id(0) * SIZE + dims
    if OVERLAPS:
        gdc_wait()
    before = tl.load(residual_ptr + offsets, mask=mask, other=0.0)
    parts = ()
    for part in tl.static_range(NUM_PARTS):  # all asked for before the first is used
        parts = parts + (tl.load(parts_ptr + part * part_stride + offsets, mask=mask, other=0.0),)
    total = tl.zeros([PADDED], tl.float32)
    for part in tl.static_range(NUM_PARTS):
        total += parts[part]
    x = (total + before.to(tl.float32)).to(dtype)
    tl.store(residual_ptr + offsets, x, mask=mask)
    x = x.to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)).to(dtype).to(tl.float32)
    tl.store(y_ptr + offsets, (normed * weight).to(dtype), mask=mask)


def sum_norm(parts_STD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """residual += the parts in place, then rms_norm(residual) -> [T, D]."""
    num_parts, num_tokens, size = parts_STD.shape
    padded = triton.next_power_of_2(size)
    y_TD, overlaps = torch.empty_like(residual_TD), can_overlap(residual_TD.device)
    sum_norm_kernel[(num_tokens,)](
        parts_STD, residual_TD, weight_D, y_TD, eps, num_tokens * size,
        SIZE=size, PADDED=padded, NUM_PARTS=num_parts, OVERLAPS=overlaps,
        num_warps=min(8, max(1, padded // 128)), **({"launch_pdl": True} if overlaps else {}),
    )  # fmt: skip
    return y_TD
