"""The gated product of many rows, silu(x gate^T) * (x up^T), in one kernel: Gluon, for Hopper GPUs alone.

A program stays on its multiprocessor and takes one tile after the other, 128 tokens and 128 gates with their ups. Its
warps have three roles and meet at barriers in shared memory, so that nobody waits for a copy or a store:

    load      1 warp    | tokens, gates, ups: inputs 0 .. 64 | 64 .. 128 | ..      by the copy engine, DEPTH turns ahead
    multiply  4 warps   | 64 tokens x 256 sums, in registers ...... | silu(gates) * ups, store | next ..
    multiply  4 warps   the same for the other 64 tokens; the sums of a gate and its up are one thread's

So neither gates nor ups are ever written, which takes as long, with reading them again, as 0.08 (4,096 inputs) to 0.35
(1,024) of the product. Sums are taken in the order of the inputs: an output depends on its token alone. It knows no
layers.

Shapes: T tokens, D inputs, F gated outputs.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
# (Gluon functions have no types that Python knows)

from __future__ import annotations

import triton
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

from minillm.kernels.attention import num_multiprocessors
from minillm.kernels.hopper_layouts import shared_layout, sums_layout
from minillm.kernels.hopper_linear import silu
from minillm.kernels.hopper_ring import leave, make_ring, wait_filled, wait_left

__all__ = ["gated_linear", "is_faster"]

TILE_TOKENS = gl.constexpr(128)
HALF_TOKENS = gl.constexpr(64)
"""Of one multiplying group: what one instruction of four warps multiplies."""
TILE_OUT = gl.constexpr(128)
TILE_IN = gl.constexpr(64)
DEPTH = gl.constexpr(4)
NEARBY = gl.constexpr(8)
"""Tiles of tokens that are done for one tile of outputs before the next: their inputs stay in the L2 cache."""


def is_faster(num_tokens: int, num_out: int, num_programs: int) -> bool:
    """Than cuBLAS and a kernel for the activation (measured on an H100, sizes of qwen3-0.6b and llama-3.1-8b).

    By the share of real tokens in the rounds that the tiles take. cuBLAS has other tiles to choose from, but for up to
    256 tokens none that would fill a round better.
    """
    num_tiles = triton.cdiv(num_tokens, TILE_TOKENS.value) * triton.cdiv(num_out, TILE_OUT.value)
    num_places = triton.cdiv(num_tiles, num_programs) * num_programs
    useful = num_tokens * num_out / (num_places * TILE_TOKENS.value * TILE_OUT.value)
    return bool(useful >= (0.9 if 2 * TILE_TOKENS.value < num_tokens <= 1024 else 0.8))


@gluon.jit
def tile_at(index, num_token_tiles, NUM_OUT_TILES: gl.constexpr):
    """Place of a tile among tokens and among outputs: NEARBY tiles of tokens, output tile by output tile."""
    first = index // (NEARBY * NUM_OUT_TILES) * NEARBY
    num_tokens = gl.minimum(num_token_tiles - first, NEARBY)
    rest = index % (NEARBY * NUM_OUT_TILES)
    return first + rest % num_tokens, rest // num_tokens


@gluon.jit
def load_tiles(ring, rows, weights, num_token_tiles, NUM_IN: gl.constexpr, NUM_OUT: gl.constexpr):
    """One warp: the operands of all tiles of this program. What lies outside of a matrix comes as zeros."""
    NUM_OUT_TILES: gl.constexpr = (NUM_OUT + TILE_OUT - 1) // TILE_OUT
    tokens = ring[0][0]._reinterpret(rows.dtype, [DEPTH, TILE_TOKENS, TILE_IN], shared_layout(2))
    halves = ring[0][1]._reinterpret(rows.dtype, [DEPTH * 2, TILE_OUT, TILE_IN], shared_layout(2))
    turn = 0
    for index in range(gl.program_id(0), num_token_tiles * NUM_OUT_TILES, gl.num_programs(0)):
        token_tile, out_tile = tile_at(index, num_token_tiles, NUM_OUT_TILES)
        first_token = token_tile * TILE_TOKENS
        first_out = out_tile * TILE_OUT
        for first_in in range(0, NUM_IN, TILE_IN):
            place = turn % DEPTH
            wait_left(ring, turn)
            filled = ring[1].index(place)
            mbarrier.expect(filled, (TILE_TOKENS + 2 * TILE_OUT) * TILE_IN * 2)
            tma.async_copy_global_to_shared(rows, [first_token, first_in], filled, tokens.index(place))
            tma.async_copy_global_to_shared(weights, [first_out, first_in], filled, halves.index(place * 2))
            ups = [NUM_OUT + first_out, first_in]
            tma.async_copy_global_to_shared(weights, ups, filled, halves.index(place * 2 + 1))
            turn += 1


@gluon.jit
def sum_tile(ring, turn, HALF: gl.constexpr, NUM_IN: gl.constexpr):
    """Four warps: sums of gates and of ups, each [64, 128], of one half of a tile's tokens; and the next turn."""
    sums = gl.zeros([HALF_TOKENS, 2 * TILE_OUT], gl.float32, sums_layout(2 * TILE_OUT))
    for first_in in range(0, NUM_IN, TILE_IN):
        wait_filled(ring, turn)
        x = ring[0][0].index(turn % DEPTH * 2 + HALF)
        sums = warpgroup_mma(x, ring[0][1].index(turn % DEPTH).permute((1, 0)), sums, is_async=True)
        sums = warpgroup_mma_wait(1, deps=[sums])
        leave(ring, turn - 1, pred=first_in > 0)
        turn += 1
    sums = warpgroup_mma_wait(0, deps=[sums])
    leave(ring, turn - 1)
    gates, ups = sums.reshape([HALF_TOKENS, 2, TILE_OUT]).permute((0, 2, 1)).split()
    return gates, ups, turn


@gluon.jit
def gate_tiles(ring, stored, y, num_token_tiles, HALF: gl.constexpr, NUM_IN: gl.constexpr, NUM_OUT: gl.constexpr):
    """Four warps: one half of the tokens of all tiles of this program."""
    NUM_OUT_TILES: gl.constexpr = (NUM_OUT + TILE_OUT - 1) // TILE_OUT
    turn = 0
    for index in range(gl.program_id(0), num_token_tiles * NUM_OUT_TILES, gl.num_programs(0)):
        token_tile, out_tile = tile_at(index, num_token_tiles, NUM_OUT_TILES)
        gates, ups, turn = sum_tile(ring, turn, HALF, NUM_IN)
        gated = gl.convert_layout((silu(gates) * ups).to(y.dtype), sums_layout(TILE_OUT))
        tma.store_wait(0)  # the tile before has left
        stored.index(HALF).store(gated)
        fence_async_shared()
        corner = [token_tile * TILE_TOKENS + HALF * HALF_TOKENS, out_tile * TILE_OUT]
        tma.async_copy_shared_to_global(y, corner, stored.index(HALF))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_token_tiles"])
def gated_kernel(rows, weights, y, num_token_tiles, NUM_IN: gl.constexpr, NUM_OUT: gl.constexpr):
    """Any number of programs."""
    dtype: gl.constexpr = y.dtype
    tokens = gl.allocate_shared_memory(dtype, [DEPTH * 2, HALF_TOKENS, TILE_IN], shared_layout(2))
    pairs = gl.allocate_shared_memory(dtype, [DEPTH, 2 * TILE_OUT, TILE_IN], shared_layout(2))
    stored = gl.allocate_shared_memory(dtype, [2, HALF_TOKENS, TILE_OUT], shared_layout(2))
    ring = make_ring((tokens, pairs), DEPTH, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (gate_tiles, (ring, stored, y, num_token_tiles, 0, NUM_IN, NUM_OUT)),
            (gate_tiles, (ring, stored, y, num_token_tiles, 1, NUM_IN, NUM_OUT)),
            (load_tiles, (ring, rows, weights, num_token_tiles, NUM_IN, NUM_OUT)),
        ],
        [4, 1],
        [240, 24],  # registers of a thread: what the multiplying groups need, the other leaves
    )  # fmt: skip


def gated_linear(x_TD: Tensor, weight_2FD: Tensor) -> Tensor:
    """silu(first half) * second half of x W^T -> [T, F]; bfloat16 or float16, D and F multiples of 8."""
    x_TD = x_TD.contiguous()
    num_tokens, num_in = x_TD.shape
    num_out = len(weight_2FD) // 2
    y_TF = x_TD.new_empty(num_tokens, num_out)
    token_tiles = triton.cdiv(num_tokens, TILE_TOKENS.value)
    num_tiles = token_tiles * triton.cdiv(num_out, TILE_OUT.value)
    gated_kernel[(min(num_tiles, num_multiprocessors(x_TD.device)),)](
        TensorDescriptor.from_tensor(x_TD, [TILE_TOKENS.value, TILE_IN.value], shared_layout(2)),
        TensorDescriptor.from_tensor(weight_2FD, [TILE_OUT.value, TILE_IN.value], shared_layout(2)),
        TensorDescriptor.from_tensor(y_TF, [HALF_TOKENS.value, TILE_OUT.value], shared_layout(2)),
        token_tiles, NUM_IN=num_in, NUM_OUT=num_out, num_warps=4,
    )  # fmt: skip
    return y_TF
