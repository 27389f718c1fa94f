"""Layouts that Hopper's copy engine and tensor cores ask for, of operands and of sums. It knows no kernel."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (Gluon functions have no types that Python knows)

from __future__ import annotations

import triton
from triton.experimental.gluon import language as gl

__all__ = ["shared_layout", "sums_layout"]


@triton.constexpr_function
def shared_layout(rank):
    """Rows of 128 bytes, 16-byte pieces exchanged within each eight rows, as copy engine and tensor cores want them."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


@triton.constexpr_function
def sums_layout(columns):
    """Of a product [64, columns] over four warps; a thread has two neighbours of each eight columns, in two rows."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])
