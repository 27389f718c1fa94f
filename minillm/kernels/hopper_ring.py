"""Buffers in shared memory that one role of a Gluon kernel fills and others leave, turn by turn, for Hopper GPUs.

A ring is (buffers, barriers `filled`, barriers `left`); it is as deep as it has barriers of a kind. Turn t has buffer
t % depth. It knows nothing of what the buffers hold.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
# (Gluon functions have no types that Python knows)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

__all__ = ["leave", "make_ring", "wait_filled", "wait_left"]


@gluon.jit
def make_ring(buffers, DEPTH: gl.constexpr, NUM_USERS: gl.constexpr):
    """A ring of DEPTH buffers that one role fills and NUM_USERS others leave."""
    filled = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    left = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(DEPTH):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(left.index(stage), count=NUM_USERS)
    return buffers, filled, left


@gluon.jit
def wait_filled(ring, turn, pred=True):
    """Until the ring's buffer of this turn holds what it is to hold."""
    DEPTH: gl.constexpr = ring[1].type.shape[0]
    mbarrier.wait(ring[1].index(turn % DEPTH), (turn // DEPTH) & 1, pred=pred)


@gluon.jit
def wait_left(ring, turn):
    """Until all users have left the buffer of this turn, as it was a round ago."""
    DEPTH: gl.constexpr = ring[2].type.shape[0]
    mbarrier.wait(ring[2].index(turn % DEPTH), ((turn // DEPTH) & 1) ^ 1)


@gluon.jit
def leave(ring, turn, pred=True):
    """A user is done with the buffer of this turn."""
    DEPTH: gl.constexpr = ring[2].type.shape[0]
    mbarrier.arrive(ring[2].index(turn % DEPTH), count=1, pred=pred)
