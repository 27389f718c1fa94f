"""The gated product of many rows, silu(x gate^T) * (x up^T), in one kernel: Gluon, for Hopper GPUs alone.

A program stays on its multiprocessor and takes one tile after the other, 128 tokens and 128 gates with their ups; in
the last round, which they would seldom fill, a narrower one. Its warps have three roles and meet at barriers in shared
memory, so that nobody waits for a copy or a store:

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
PIECE = gl.constexpr(32)
"""Gates or ups that a narrow tile is copied by; it has one to three such pieces of each."""
NEARBY = gl.constexpr(8)
"""Tiles of tokens that are done for one tile of outputs before the next: their inputs stay in the L2 cache."""
NARROW_COST = {32: 0.3, 64: 0.5, 96: 0.85}
"""Outputs that the tiles of a narrow last round may have, fewest first, and its time over that of a full one (H200,
llama-3.1-8b)."""


def is_faster(num_tokens: int, num_out: int, num_programs: int) -> bool:
    """Than cuBLAS and a kernel for the activation (measured on H100 and H200, sizes of qwen3-0.6b and llama-3.1-8b).

    By what full rounds would hold in the time that the tiles take, and how much of that are real tokens. cuBLAS has
    other tiles to choose from; for up to 256 tokens they matter less, as reading the weights takes as long.
    """
    token_tiles = triton.cdiv(num_tokens, TILE_TOKENS.value)
    num_wide, width = choose_widths(token_tiles, num_out, num_programs)
    rounds = triton.cdiv(token_tiles * num_wide, num_programs) + NARROW_COST.get(width, 0.0)
    useful = num_tokens * num_out / (rounds * num_programs * TILE_TOKENS.value * TILE_OUT.value)
    return bool(useful >= (0.79 if num_tokens <= 2 * TILE_TOKENS.value else 0.85))


def choose_widths(token_tiles: int, num_out: int, num_programs: int) -> tuple[int, int]:
    """Output tiles of full width, and the outputs of a narrow one: 32, 64, 96, or 0 where the last round wants all.

    6 tiles of tokens, 14,336 outputs, 132 programs: 5 rounds of 128 outputs, a last one of 32
    | 128 | 128 | ... 110 of them | 32 | 32 | ... 8 of them |
    """
    rounds = triton.cdiv(token_tiles * triton.cdiv(num_out, TILE_OUT.value), num_programs)
    num_wide = (rounds - 1) * num_programs // token_tiles
    rest = num_out - num_wide * TILE_OUT.value
    for width in NARROW_COST:
        if token_tiles * triton.cdiv(rest, width) <= num_programs:
            return num_wide, width
    return triton.cdiv(num_out, TILE_OUT.value), 0


def grid_size(token_tiles: int, num_out: int, num_programs: int) -> int:
    """Programs to launch: one for each tile of a round, and as many as there are narrow tiles, as none takes two."""
    num_wide, width = choose_widths(token_tiles, num_out, num_programs)
    num_narrow = triton.cdiv(num_out - num_wide * TILE_OUT.value, width) if width else 0
    return min(token_tiles * max(num_wide, num_narrow), num_programs)


@gluon.jit
def tile_at(index, num_token_tiles, num_out_tiles):
    """Place of a tile among tokens and among outputs: NEARBY tiles of tokens, output tile by output tile."""
    first = index // (NEARBY * num_out_tiles) * NEARBY
    num_tokens = gl.minimum(num_token_tiles - first, NEARBY)
    rest = index % (NEARBY * num_out_tiles)
    return first + rest % num_tokens, rest // num_tokens


@triton.constexpr_function
def place_of(piece, is_up, width):
    """Where a piece of a narrow tile lies in its buffer: | gates 0, 1 | ups 0, 1 | gates 2 | ups 2 |.

    So what one instruction multiplies lies together: 64 gates and their ups, or 32.
    """
    first = min(width // PIECE.value, 2)
    return piece + first * is_up if piece < first else 2 * first + is_up


@gluon.jit
def load_tiles(
    ring, rows, weights, pieces, num_token_tiles, num_wide,
    NUM_IN: gl.constexpr, NUM_OUT: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """One warp: the operands of all tiles of this program. What lies outside of a matrix comes as zeros."""
    tokens = ring[0][0]._reinterpret(rows.dtype, [DEPTH, TILE_TOKENS, TILE_IN], shared_layout(2))
    halves = ring[0][1]._reinterpret(rows.dtype, [DEPTH * 2, TILE_OUT, TILE_IN], shared_layout(2))
    parts = ring[0][1]._reinterpret(rows.dtype, [DEPTH * 8, PIECE, TILE_IN], shared_layout(2))
    turn = 0
    for index in range(gl.program_id(0), num_token_tiles * num_wide, gl.num_programs(0)):
        token_tile, out_tile = tile_at(index, num_token_tiles, num_wide)
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
    if WIDTH > 0:
        first_token, first_out, is_tile = narrow_tile(num_token_tiles, num_wide, NUM_OUT, WIDTH)
        for first_in in range(0, gl.where(is_tile, NUM_IN, 0), TILE_IN):
            place = turn % DEPTH
            wait_left(ring, turn)
            filled = ring[1].index(place)
            mbarrier.expect(filled, (TILE_TOKENS + 2 * WIDTH) * TILE_IN * 2)
            tma.async_copy_global_to_shared(rows, [first_token, first_in], filled, tokens.index(place))
            for piece in gl.static_range(WIDTH // PIECE):
                for is_up in gl.static_range(2):
                    part = parts.index(place * 8 + place_of(piece, is_up, WIDTH))
                    corner = [is_up * NUM_OUT + first_out + piece * PIECE, first_in]
                    tma.async_copy_global_to_shared(pieces, corner, filled, part)
            turn += 1


@gluon.jit
def narrow_tile(num_token_tiles, num_wide, NUM_OUT: gl.constexpr, WIDTH: gl.constexpr):
    """First token and output of this program's tile of the last round, and whether it has one."""
    index = gl.program_id(0)
    first_out = num_wide * TILE_OUT + index // num_token_tiles * WIDTH
    return index % num_token_tiles * TILE_TOKENS, first_out, first_out < NUM_OUT


@gluon.jit
def gated(sums, WIDTH: gl.constexpr):
    """silu(gates) * ups [64, WIDTH] of sums [64, 2 WIDTH], in float32; both are one thread's."""
    gates, ups = sums.reshape([HALF_TOKENS, 2, WIDTH]).permute((0, 2, 1)).split()
    return gl.convert_layout(silu(gates) * ups, sums_layout(WIDTH))


@gluon.jit
def sum_tile(ring, turn, HALF: gl.constexpr, NUM_IN: gl.constexpr):
    """Four warps: gated outputs [64, 128] of one half of a tile's tokens, and the next turn."""
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
    return gated(sums, TILE_OUT), turn


@gluon.jit
def store_columns(y_ptr, outs, first_token, first_out, num_tokens, NUM_OUT: gl.constexpr, WIDTH: gl.constexpr):
    """Outputs [64, WIDTH] as they lie in registers: too few of them to go through shared memory."""
    layout: gl.constexpr = sums_layout(WIDTH)
    tokens = first_token + gl.arange(0, HALF_TOKENS, gl.SliceLayout(1, layout))
    columns = first_out + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    mask = (tokens < num_tokens)[:, None] & (columns < NUM_OUT)[None, :]
    offsets = tokens.to(gl.int64)[:, None] * NUM_OUT + columns[None, :]
    gl.store(y_ptr + offsets, outs.to(y_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def gate_narrow_tile(
    ring, turn, y_ptr, num_tokens, num_token_tiles, num_wide,
    HALF: gl.constexpr, NUM_IN: gl.constexpr, NUM_OUT: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Four warps: one half of the tokens of this program's tile of the last round: 32 or 64 outputs, then 32 more."""
    FIRST: gl.constexpr = min(WIDTH, 64)
    REST: gl.constexpr = WIDTH - FIRST
    first_token, first_out, is_tile = narrow_tile(num_token_tiles, num_wide, NUM_OUT, WIDTH)
    if is_tile:
        dtype: gl.constexpr = ring[0][1].dtype
        firsts = ring[0][1]._reinterpret(dtype, [DEPTH * (TILE_OUT // FIRST), 2 * FIRST, TILE_IN], shared_layout(2))
        rests = ring[0][1]._reinterpret(dtype, [DEPTH * 4, 2 * PIECE, TILE_IN], shared_layout(2))
        sums = gl.zeros([HALF_TOKENS, 2 * FIRST], gl.float32, sums_layout(2 * FIRST))
        rest_sums = gl.zeros([HALF_TOKENS, 2 * PIECE], gl.float32, sums_layout(2 * PIECE))
        for first_in in range(0, NUM_IN, TILE_IN):
            wait_filled(ring, turn)
            place = turn % DEPTH
            x = ring[0][0].index(place * 2 + HALF)
            sums = warpgroup_mma(x, firsts.index(place * (TILE_OUT // FIRST)).permute((1, 0)), sums, is_async=True)
            if REST > 0:
                rest_sums = warpgroup_mma(x, rests.index(place * 4 + 2).permute((1, 0)), rest_sums, is_async=True)
                sums, rest_sums = warpgroup_mma_wait(2, deps=[sums, rest_sums])
            else:
                sums = warpgroup_mma_wait(1, deps=[sums])
            leave(ring, turn - 1, pred=first_in > 0)
            turn += 1
        sums, rest_sums = warpgroup_mma_wait(0, deps=[sums, rest_sums])
        leave(ring, turn - 1)
        first_token += HALF * HALF_TOKENS
        store_columns(y_ptr, gated(sums, FIRST), first_token, first_out, num_tokens, NUM_OUT, FIRST)
        if REST > 0:
            rest = gated(rest_sums, PIECE)
            store_columns(y_ptr, rest, first_token, first_out + FIRST, num_tokens, NUM_OUT, PIECE)


@gluon.jit
def gate_tiles(
    ring, stored, y, y_ptr, num_tokens, num_token_tiles, num_wide,
    HALF: gl.constexpr, NUM_IN: gl.constexpr, NUM_OUT: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Four warps: one half of the tokens of all tiles of this program."""
    turn = 0
    for index in range(gl.program_id(0), num_token_tiles * num_wide, gl.num_programs(0)):
        token_tile, out_tile = tile_at(index, num_token_tiles, num_wide)
        outs, turn = sum_tile(ring, turn, HALF, NUM_IN)
        tma.store_wait(0)  # the tile before has left
        stored.index(HALF).store(outs.to(y.dtype))
        fence_async_shared()
        corner = [token_tile * TILE_TOKENS + HALF * HALF_TOKENS, out_tile * TILE_OUT]
        tma.async_copy_shared_to_global(y, corner, stored.index(HALF))
    if WIDTH > 0:
        gate_narrow_tile(ring, turn, y_ptr, num_tokens, num_token_tiles, num_wide, HALF, NUM_IN, NUM_OUT, WIDTH)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tokens", "num_token_tiles", "num_wide"])
def gated_kernel(
    rows, weights, pieces, y, y_ptr, num_tokens, num_token_tiles, num_wide,
    NUM_IN: gl.constexpr, NUM_OUT: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Grid: `grid_size`. WIDTH: outputs of the last round's tiles if they are narrow."""
    dtype: gl.constexpr = y.dtype
    tokens = gl.allocate_shared_memory(dtype, [DEPTH * 2, HALF_TOKENS, TILE_IN], shared_layout(2))
    pairs = gl.allocate_shared_memory(dtype, [DEPTH, 2 * TILE_OUT, TILE_IN], shared_layout(2))
    stored = gl.allocate_shared_memory(dtype, [2, HALF_TOKENS, TILE_OUT], shared_layout(2))
    ring = make_ring((tokens, pairs), DEPTH, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (gate_tiles, (ring, stored, y, y_ptr, num_tokens, num_token_tiles, num_wide, 0, NUM_IN, NUM_OUT, WIDTH)),
            (gate_tiles, (ring, stored, y, y_ptr, num_tokens, num_token_tiles, num_wide, 1, NUM_IN, NUM_OUT, WIDTH)),
            (load_tiles, (ring, rows, weights, pieces, num_token_tiles, num_wide, NUM_IN, NUM_OUT, WIDTH)),
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
    sizes = triton.cdiv(num_tokens, TILE_TOKENS.value), num_out, num_multiprocessors(x_TD.device)
    num_wide, width = choose_widths(*sizes)
    gated_kernel[(grid_size(*sizes),)](
        TensorDescriptor.from_tensor(x_TD, [TILE_TOKENS.value, TILE_IN.value], shared_layout(2)),
        TensorDescriptor.from_tensor(weight_2FD, [TILE_OUT.value, TILE_IN.value], shared_layout(2)),
        TensorDescriptor.from_tensor(weight_2FD, [PIECE.value, TILE_IN.value], shared_layout(2)),
        TensorDescriptor.from_tensor(y_TF, [HALF_TOKENS.value, TILE_OUT.value], shared_layout(2)), y_TF,
        num_tokens, sizes[0], num_wide, NUM_IN=num_in, NUM_OUT=num_out, WIDTH=width, num_warps=4,
    )  # fmt: skip
    return y_TF
