"""Products of one to eight rows with a matrix, and what surrounds a product folded into it: norm, SiLU, bias, residual.

Such a step is bound by the time to read the weights, and small kernels between the products leave the memory idle. So a
program asks for all its weights before it waits for the kernel before it (programmatic dependent launch):

    time ->   | this kernel: rows arrive, sum, store |
              | the next one: weights on their way ......... | rows arrive, sum, store |

Before `gdc_wait` a kernel may only read what no kernel of the step writes (here: weights), and it writes nothing.
One row is summed in plain float32, several on the tensor cores, each alike whatever the others are. It knows no layers.

Shapes: T tokens (few), D inputs, O outputs, F gated outputs.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, unreachable, var-annotated"
# (Triton functions have no types that Python knows)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from minillm.kernels.decode_attention import can_overlap

__all__ = ["MAX_ROWS", "add_linear", "max_fused_rows", "norm_gated_linear", "norm_linear"]

MAX_ROWS = 8
"""Most rows of a step for which these kernels are meant: what one tensor-core product takes beside its weights."""
MAX_SHARED_HIDDEN = 1024
MAX_SHARED_INPUTS = 4096
"""Largest products of several rows: at a hidden size of 2,048 cuBLAS is faster (too few programs fit at once)."""
MAX_INPUTS = 32768
"""Most inputs whose weights fit the registers of one program."""
MANY_OUTPUTS = 3072
"""Outputs from which on programs of 16 occupy a GPU."""
WARP_INPUTS = 256
"""Inputs that a warp reads at once, 16 bytes a lane: a multiple keeps each warp's sums its own."""


class Tile(NamedTuple):
    """The share of a product that one program has: outputs, with all their inputs."""

    outputs: int
    num_warps: int

    @property
    def inputs(self) -> int:
        """Inputs per turn."""
        return self.num_warps * WARP_INPUTS


def max_fused_rows(
    *, hidden_size: int, inner_sizes: tuple[int, ...], head_size: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Most rows of one token in a step for which the fused kernels are there and the faster; 0 if for none.

    `inner_sizes`: inputs of the products whose outputs have the hidden size.
    """
    largest = max(hidden_size, *inner_sizes)
    runs = device.type == "cuda" or triton.knobs.runtime.interpret
    is_taken = dtype in (torch.bfloat16, torch.float16) and head_size % 2 == 0 and head_size <= 256
    if not runs or not is_taken or largest > MAX_INPUTS:
        return 0
    return MAX_ROWS if hidden_size <= MAX_SHARED_HIDDEN and largest <= MAX_SHARED_INPUTS else 1


def choose_tile(num_in: int, is_gated: bool) -> Tile:
    """One row: up to 4 outputs and 32 KB of weights, at most 192 bytes of them per thread (measured, H100)."""
    output_bytes = num_in * (4 if is_gated else 2)
    outputs = min(4, max(1, 32768 // output_bytes))
    outputs = 1 << (outputs.bit_length() - 1)
    return Tile(outputs, 4 if outputs * output_bytes <= 24576 else 8)


def choose_shared_tile(num_in: int, num_out: int, is_gated: bool) -> Tile:
    """Several rows: 16 outputs, the least side of a tensor-core product, or 8 where 16 would leave a GPU half idle."""
    outputs = 16 if num_out >= MANY_OUTPUTS else 8
    weight_bytes = outputs * num_in * (4 if is_gated else 2)
    num_warps = triton.next_power_of_2(triton.cdiv(weight_bytes, 256 * 32))
    return Tile(outputs, max(4, min(16, num_warps, triton.next_power_of_2(triton.cdiv(num_in, WARP_INPUTS)))))


@triton.jit
def read_weights(
    weight_ptr, tile, NUM_IN: tl.constexpr, NUM_OUT: tl.constexpr, TILE_IN: tl.constexpr, TILE_OUT: tl.constexpr
):  # fmt: skip
    """This program's weights [TILE_OUT, TILE_IN]; past the last input zero, past the last output those of the last."""
    outs = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    ins = tile * TILE_IN + tl.arange(0, TILE_IN)
    if NUM_OUT % TILE_OUT:
        outs = tl.minimum(outs, NUM_OUT - 1)
    pointers = weight_ptr + outs[:, None] * NUM_IN + ins[None, :]
    if (tile + 1) * TILE_IN > NUM_IN:
        weights = tl.load(pointers, mask=(ins < NUM_IN)[None, :], other=0.0)
    else:
        weights = tl.load(pointers)
    return weights


@triton.jit
def read_inputs(x_ptr, tile, NUM_IN: tl.constexpr, TILE_IN: tl.constexpr):
    """Inputs [TILE_IN] of a row, zero past the last."""
    ins = tile * TILE_IN + tl.arange(0, TILE_IN)
    if (tile + 1) * TILE_IN > NUM_IN:
        x = tl.load(x_ptr + ins, mask=ins < NUM_IN, other=0.0)
    else:
        x = tl.load(x_ptr + ins)
    return x


@triton.jit
def read_bias(bias_ptr, NUM_OUT: tl.constexpr, TILE_OUT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Bias [TILE_OUT] of this program's outputs in float32; zeros if there is none."""
    outs = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    bias = tl.zeros([TILE_OUT], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outs, mask=outs < NUM_OUT, other=0.0).to(tl.float32)
    return bias


@triton.jit
def silu(x):
    """x * sigmoid(x) in float32."""
    decay = tl.exp(-tl.abs(x))  # at most 1: no overflow on the way
    return x * tl.where(x < 0, decay, 1.0) / (1.0 + decay)


@triton.jit
def row_kernel(
    x_ptr, weight_ptr, norm_ptr, bias_ptr, y_ptr, eps, num_rows,
    NUM_IN: tl.constexpr, NUM_OUT: tl.constexpr, TILE_IN: tl.constexpr, TILE_OUT: tl.constexpr,
    IS_NORMED: tl.constexpr, IS_GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One row; a program has TILE_OUT outputs. IS_NORMED: RMSNorm of x first. IS_GATED: silu(first half) * second half
    of the weight's outputs. ADDS: y += product."""
    NUM_TILES: tl.constexpr = (NUM_IN + TILE_IN - 1) // TILE_IN
    if OVERLAPS:
        gdc_launch_dependents()
    outs = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    weights = ()
    ups = ()
    gains = ()
    for tile in tl.static_range(NUM_TILES):
        weights = weights + (read_weights(weight_ptr, tile, NUM_IN, NUM_OUT, TILE_IN, TILE_OUT),)
        if IS_GATED:
            up_ptr = weight_ptr + NUM_OUT * NUM_IN
            ups = ups + (read_weights(up_ptr, tile, NUM_IN, NUM_OUT, TILE_IN, TILE_OUT),)
        if IS_NORMED:
            gains = gains + (read_inputs(norm_ptr, tile, NUM_IN, TILE_IN),)
    bias = read_bias(bias_ptr, NUM_OUT, TILE_OUT, HAS_BIAS)
    up_bias = read_bias(bias_ptr + NUM_OUT, NUM_OUT, TILE_OUT, HAS_BIAS and IS_GATED)
    if OVERLAPS:
        gdc_wait()
    if ADDS:
        before = tl.load(y_ptr + outs, mask=outs < NUM_OUT, other=0.0).to(tl.float32)
    sums = tl.zeros([TILE_OUT, TILE_IN], tl.float32)
    up_sums = tl.zeros([TILE_OUT, TILE_IN], tl.float32)
    squares = tl.zeros([TILE_IN], tl.float32)
    for tile in tl.static_range(NUM_TILES):
        x = read_inputs(x_ptr, tile, NUM_IN, TILE_IN).to(tl.float32)
        if IS_NORMED:
            squares += x * x
            x = x * gains[tile].to(tl.float32)
        sums += weights[tile].to(tl.float32) * x[None, :]
        if IS_GATED:
            up_sums += ups[tile].to(tl.float32) * x[None, :]
    scale = 1.0
    if IS_NORMED:
        scale = tl.rsqrt(tl.sum(squares, 0) / NUM_IN + eps)
    y = tl.sum(sums, 1) * scale + bias
    if IS_GATED:
        y = silu(y) * (tl.sum(up_sums, 1) * scale + up_bias)
    if ADDS:
        y += before
    tl.store(y_ptr + outs, y.to(y_ptr.dtype.element_ty), mask=outs < NUM_OUT)


@triton.jit
def weights_times_rows(weights, x, acc, SPLIT: tl.constexpr, WEIGHTS_FIRST: tl.constexpr):
    """acc += weights [outs, ins] times x [rows, ins] on the tensor cores, each warp on its share of the inputs.

    acc is [SPLIT, outs, rows], or [SPLIT, rows, outs] for less than 16 outs: the first side has 16 at least.
    """
    PART: tl.constexpr = x.shape[1] // SPLIT
    weights = tl.reshape(weights, [weights.shape[0], SPLIT, PART])
    x = tl.reshape(x, [x.shape[0], SPLIT, PART])
    if WEIGHTS_FIRST:
        acc = tl.dot(tl.permute(weights, [1, 0, 2]), tl.permute(x, [1, 2, 0]), acc, input_precision="ieee")
    else:
        acc = tl.dot(tl.permute(x, [1, 0, 2]), tl.permute(weights, [1, 2, 0]), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def rows_kernel(
    x_ptr, weight_ptr, norm_ptr, bias_ptr, y_ptr, eps, num_rows,
    NUM_IN: tl.constexpr, NUM_OUT: tl.constexpr, TILE_IN: tl.constexpr, TILE_OUT: tl.constexpr,
    IS_NORMED: tl.constexpr, IS_GATED: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr,
    OVERLAPS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """`row_kernel` for `num_rows` rows, at most 8."""
    NUM_TILES: tl.constexpr = (NUM_IN + TILE_IN - 1) // TILE_IN
    WEIGHTS_FIRST: tl.constexpr = TILE_OUT >= 16
    ROWS: tl.constexpr = 8 if WEIGHTS_FIRST else 16
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    if OVERLAPS:
        gdc_launch_dependents()
    weights = ()
    ups = ()
    gains = ()
    for tile in tl.static_range(NUM_TILES):
        weights = weights + (read_weights(weight_ptr, tile, NUM_IN, NUM_OUT, TILE_IN, TILE_OUT),)
        if IS_GATED:
            up_ptr = weight_ptr + NUM_OUT * NUM_IN
            ups = ups + (read_weights(up_ptr, tile, NUM_IN, NUM_OUT, TILE_IN, TILE_OUT),)
        if IS_NORMED:
            gains = gains + (read_inputs(norm_ptr, tile, NUM_IN, TILE_IN),)
    bias = read_bias(bias_ptr, NUM_OUT, TILE_OUT, HAS_BIAS)
    up_bias = read_bias(bias_ptr + NUM_OUT, NUM_OUT, TILE_OUT, HAS_BIAS and IS_GATED)
    rows = tl.arange(0, ROWS)
    outs = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    if WEIGHTS_FIRST:
        out_ptr = y_ptr + rows[None, :] * NUM_OUT + outs[:, None]
        is_out = (rows < num_rows)[None, :] & (outs < NUM_OUT)[:, None]
        bias, up_bias = bias[:, None], up_bias[:, None]
        acc = tl.zeros([SPLIT, TILE_OUT, ROWS], tl.float32)
    else:
        out_ptr = y_ptr + rows[:, None] * NUM_OUT + outs[None, :]
        is_out = (rows < num_rows)[:, None] & (outs < NUM_OUT)[None, :]
        bias, up_bias = bias[None, :], up_bias[None, :]
        acc = tl.zeros([SPLIT, ROWS, TILE_OUT], tl.float32)
    if OVERLAPS:
        gdc_wait()
    if ADDS:
        before = tl.load(out_ptr, mask=is_out, other=0.0).to(tl.float32)
    xs = ()
    squares = tl.zeros([ROWS], tl.float32)
    for tile in tl.static_range(NUM_TILES):
        ins = tile * TILE_IN + tl.arange(0, TILE_IN)
        is_in = (rows < num_rows)[:, None] & (ins < NUM_IN)[None, :]
        xs = xs + (tl.load(x_ptr + rows[:, None] * NUM_IN + ins[None, :], mask=is_in, other=0.0),)
        if IS_NORMED:
            squares += tl.sum(xs[tile].to(tl.float32) * xs[tile].to(tl.float32), 1)
    if IS_NORMED:
        scale = tl.rsqrt(squares / NUM_IN + eps)[:, None]
    up_acc = acc
    for tile in tl.static_range(NUM_TILES):
        x = xs[tile]
        if IS_NORMED:
            normed = (x.to(tl.float32) * scale).to(dtype).to(tl.float32)
            x = (normed * gains[tile].to(tl.float32)[None, :]).to(dtype)
        acc = weights_times_rows(weights[tile], x, acc, SPLIT, WEIGHTS_FIRST)
        if IS_GATED:
            up_acc = weights_times_rows(ups[tile], x, up_acc, SPLIT, WEIGHTS_FIRST)
    y = tl.sum(acc, 0) + bias
    if IS_GATED:
        y = silu(y) * (tl.sum(up_acc, 0) + up_bias)
    if ADDS:
        y += before
    tl.store(out_ptr, y.to(dtype), mask=is_out)


def launch(x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, y_TO: Tensor, **steps: Any) -> Tensor:
    """The launch behind the three products. `steps`: norm (weight_D, eps), is_gated, adds."""
    num_tokens, num_in = x_TD.shape
    norm, is_gated = steps.get("norm"), steps.get("is_gated", False)
    num_out, overlaps = y_TO.shape[1], can_overlap(x_TD.device)
    assert 1 <= num_tokens <= MAX_ROWS and x_TD.is_contiguous() and y_TO.is_contiguous()
    norm_D, eps = norm or (x_TD, 0.0)
    tile = choose_tile(num_in, is_gated) if num_tokens == 1 else choose_shared_tile(num_in, num_out, is_gated)
    kernel, split = (row_kernel, {}) if num_tokens == 1 else (rows_kernel, {"SPLIT": tile.num_warps})
    kernel[(triton.cdiv(num_out, tile.outputs),)](
        x_TD, weight_OD, norm_D, x_TD if bias_O is None else bias_O, y_TO, eps, num_tokens,
        NUM_IN=num_in, NUM_OUT=num_out, TILE_IN=tile.inputs, TILE_OUT=tile.outputs,
        IS_NORMED=norm is not None, IS_GATED=is_gated, HAS_BIAS=bias_O is not None, ADDS=steps.get("adds", False),
        OVERLAPS=overlaps, **split, num_warps=tile.num_warps, **({"launch_pdl": True} if overlaps else {}),
    )  # fmt: skip
    return y_TO


def norm_linear(x_TD: Tensor, norm_D: Tensor, eps: float, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    """rms_norm(x) W^T + b -> [T, O], for T up to 8."""
    return launch(x_TD, weight_OD, bias_O, x_TD.new_empty(x_TD.shape[0], weight_OD.shape[0]), norm=(norm_D, eps))


def norm_gated_linear(x_TD: Tensor, norm_D: Tensor, eps: float, weight_2FD: Tensor, bias_2F: Tensor | None) -> Tensor:
    """silu(first half) * second half of rms_norm(x) W^T + b -> [T, F], for T up to 8."""
    y_TF = x_TD.new_empty(x_TD.shape[0], weight_2FD.shape[0] // 2)
    return launch(x_TD, weight_2FD, bias_2F, y_TF, norm=(norm_D, eps), is_gated=True)


def add_linear(residual_TO: Tensor, x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> None:
    """residual += x W^T + b in place, for T up to 8."""
    launch(x_TD, weight_OD, bias_O, residual_TO, adds=True)
