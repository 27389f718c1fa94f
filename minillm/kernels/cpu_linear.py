"""Weights in the layouts of a CPU's matrix libraries, and the products with them: fp32, 16 bits, and 4-bit codes.

It knows tensors only. Shapes: T tokens, D inputs, O outputs, E codes of a row, G groups of codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CodedWeight", "Codes", "PackedWeight", "linear", "pack_linear"]

PACKED_ROWS = 512  # the batch that MKL packs for; measured good for 1 to 2,048 rows
UPCAST_ROWS = 96  # from here on fp32 products, with a copy of the weight, beat bf16 ones without matrix units
MAX_CODED_ROWS = 12  # up to here products from 4-bit codes, expanded anew for every 4 rows, beat those of wide weights
CODED_OUTPUTS = 16  # the product from codes wants a multiple of this
CODED_CPUS = ("AVX2", "AVX512")  # elsewhere torch multiplies codes one by one


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in a matrix library's own layout."""

    data: Tensor
    """Opaque."""
    shape_OD: Tensor
    """Holds no memory, only the weight's shape and dtype."""
    coded: CodedWeight | None = None
    """For few rows."""


class Codes(Protocol):
    """Codes 0 to 15 of a matrix and, per group of entries, what makes them numbers: (code - 8) * scale + zero."""

    @property
    def codes_OE(self) -> Tensor: ...
    @property
    def scales_OG(self) -> Tensor: ...
    @property
    def zeros_OG(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """A weight as 4-bit codes in torch's own layout; scales and zeros are rounded to bf16."""

    data: Tensor
    """Opaque."""
    scales_zeros_GO2: Tensor
    group: int
    num_repeats: int
    """How often the inputs are repeated, to meet all codes of a row."""


def pack_linear(weight_OD: Tensor, codes: Codes | None = None) -> PackedWeight | Tensor:
    """The weight laid out for `linear`, so that the original can go; the weight itself where packing gains nothing.

    With `codes`, of the same weight, products of few rows read these instead: a sixth of the memory of fp32. Without,
    and with AVX-512, packed fp32 products give a row the same bits whatever rows are beside it; `F.linear`'s do not.
    """
    packed = pack_wide(weight_OD)
    if codes is None or not isinstance(packed, PackedWeight) or not is_coded_fast(codes):
        return packed
    with torch.no_grad():
        data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.codes_OE.int(), 1)
        pairs_GO2 = torch.stack((codes.scales_OG.t(), codes.zeros_OG.t()), dim=-1).bfloat16()
    num_codes = codes.codes_OE.shape[1]
    group, num_repeats = num_codes // codes.scales_OG.shape[1], num_codes // weight_OD.shape[1]
    return replace(packed, coded=CodedWeight(data, pairs_GO2, group, num_repeats))


def is_coded_fast(codes: Codes) -> bool:
    """Whether torch multiplies these codes with vector instructions on this CPU."""
    return codes.codes_OE.shape[0] % CODED_OUTPUTS == 0 and torch.backends.cpu.get_cpu_capability() in CODED_CPUS


def pack_wide(weight_OD: Tensor) -> PackedWeight | Tensor:
    """The weight in its own dtype, in a matrix library's layout if one is there."""
    if weight_OD.device.type != "cpu":
        return weight_OD
    with torch.no_grad():
        shape_OD = torch.empty(1, dtype=weight_OD.dtype).expand(weight_OD.shape)
        if weight_OD.dtype == torch.float32 and hasattr(torch.ops.mkl, "_mkl_linear"):
            weight_OD = weight_OD.contiguous()
            return PackedWeight(torch.ops.mkl._mkl_reorder_linear_weight(weight_OD, PACKED_ROWS), shape_OD)
        if is_half_packed(weight_OD.dtype):
            return PackedWeight(torch.ops.mkldnn._reorder_linear_weight(weight_OD.contiguous()), shape_OD)
    return weight_OD


def is_half_packed(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this 16-bit dtype on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def linear(x_TD: Tensor, weight_OD: PackedWeight | Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x times the weight's transpose, plus the bias -> y_TO."""
    if isinstance(weight_OD, Tensor):
        return F.linear(x_TD, weight_OD, bias_O)
    y_TO: Tensor
    data, shape_OD = weight_OD.data, weight_OD.shape_OD
    num_tokens = x_TD.shape[0]
    if weight_OD.coded is not None and num_tokens <= MAX_CODED_ROWS:
        y_TO = coded_product(x_TD, weight_OD.coded)
        return y_TO if bias_O is None else y_TO.add_(bias_O)
    if x_TD.dtype == torch.float32:
        y_TO = torch.ops.mkl._mkl_linear(x_TD, data, shape_OD, bias_O, num_tokens)
        return y_TO
    if x_TD.dtype == torch.bfloat16 and num_tokens >= UPCAST_ROWS and not torch.cpu._is_amx_tile_supported():
        wide_TO = F.linear(x_TD.float(), data.to_dense(torch.float32))
        return (wide_TO if bias_O is None else wide_TO.add_(bias_O)).to(x_TD.dtype)
    y_TO = torch.ops.mkldnn._linear_pointwise(x_TD.contiguous(), data, bias_O, "none", [], "")
    return y_TO


def coded_product(x_TD: Tensor, weight: CodedWeight) -> Tensor:
    """x times the transpose of a weight of codes -> y_TO; inputs and outputs are rounded to bf16, sums are fp32."""
    x_TE = x_TD.bfloat16() if weight.num_repeats == 1 else x_TD.bfloat16().repeat(1, weight.num_repeats)
    y_TO = torch._weight_int4pack_mm_for_cpu(x_TE, weight.data, weight.group, weight.scales_zeros_GO2)
    return y_TO.to(x_TD.dtype)
