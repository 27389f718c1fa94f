"""BlockPool: reference-counted KV blocks and the index from prefix keys to blocks. It knows no requests.

A block is in use (count > 0), cached (count 0, still found by its key) or empty (count 0, no key). Empty blocks are
taken first, then cached ones, least recently used first. Block 0 is a dummy and never handed out.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable

__all__ = ["BlockPool"]


class BlockPool:
    """`num_blocks` blocks, the dummy included."""

    def __init__(self, num_blocks: int) -> None:
        self.ref_counts = array("i", [0]) * num_blocks
        self.block_of: dict[bytes, int] = {}
        self.key_of: dict[int, bytes] = {}
        self.num_shared = 0
        """Blocks with more than one reference."""
        self._empty = array("i", range(num_blocks - 1, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def num_free(self) -> int:
        """Blocks that can be taken."""
        return len(self._empty) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Those of them that a prompt may still find."""
        return len(self._cached)

    def take(self, num: int) -> array[int]:
        """`num` blocks, each with one reference; the caller has checked `num_free`."""
        empty, ref_counts = self._empty, self.ref_counts
        blocks = array("i")
        for _ in range(num):
            if empty:
                block = empty.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                del self.block_of[self.key_of.pop(block)]
            ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each, which is in use or cached."""
        for block in blocks:
            if self.ref_counts[block] == 0:
                del self._cached[block]
            elif self.ref_counts[block] == 1:
                self.num_shared += 1
            self.ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less to each; the first one released is the first one reused."""
        ref_counts, key_of = self.ref_counts, self.key_of
        for block in blocks:
            ref_counts[block] -= 1
            if ref_counts[block] == 0:
                if block in key_of:
                    self._cached[block] = None
                else:
                    self._empty.append(block)
            elif ref_counts[block] == 1:
                self.num_shared -= 1

    def count_unused(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nothing refers to: sharing one of them takes it from the free ones."""
        ref_counts = self.ref_counts
        return sum(ref_counts[block] == 0 for block in blocks)

    def publish(self, block: int, key: bytes) -> None:
        """Let `key` find `block`, unless another block with the same content is found by it already."""
        if key not in self.block_of and block not in self.key_of:
            self.block_of[key] = block
            self.key_of[block] = key

    def check_invariants(self, ref_counts: array[int]) -> None:
        """Assert that `ref_counts`, counted by the caller, are ours, and that each block is in one place."""
        assert ref_counts == self.ref_counts, "reference counts differ from block tables and holds"
        assert self.num_shared == sum(count > 1 for count in ref_counts), "shared blocks are miscounted"
        free = sorted([*self._empty, *self._cached])
        assert free == [b for b in range(1, len(ref_counts)) if ref_counts[b] == 0], "free blocks are not unused"
        assert {b: k for k, b in self.block_of.items()} == self.key_of, "keys and blocks do not match"
        assert all(b in self.key_of for b in self._cached) and not any(b in self.key_of for b in self._empty)
