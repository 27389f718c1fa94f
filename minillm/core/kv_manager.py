"""KVManager: which blocks hold a request's keys and values, and which of them others may share.

Every operation succeeds completely or changes nothing. It decides no order and no amount of work.
References are held by requests and by holds (transfers to come); a block is free when neither is left.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

from minillm.core.block_pool import BlockPool
from minillm.core.plan import ints
from minillm.core.request import NEVER, Request

__all__ = ["KVManager", "Prefix"]

KEY_SIZE = 32
MIN_PUBLISHED = 64


class Prefix(NamedTuple):
    """What a request need not compute: `num_tokens` in whole `blocks`, the rest copied from the block `copied`."""

    num_tokens: int
    blocks: Sequence[int]
    copied: int  # 0: none


class KVManager:
    """`num_blocks` blocks, the dummy block 0 included, of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.pool = BlockPool(num_blocks)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_promised = 0
        """Blocks that requests were admitted for and have not taken yet."""
        self._holds: dict[int, int] = {}
        self._unpublished: deque[Request] = deque()

    @property
    def usage(self) -> float:
        """Share of the blocks that a request or a hold refers to, in [0, 1]."""
        return 1.0 - self.pool.num_free / (self.num_blocks - 1)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def extend_keys(self, request: Request, num_blocks: int) -> None:
        """Know the keys of the first `num_blocks` blocks, all full of tokens read.

        A key is a hash of the block's tokens and of the key before it, so that it stands for the whole prefix; the
        first is chained to the request's salt.
        """
        keys = request.keys
        first, size = len(keys), self.block_size
        assert num_blocks * size <= len(request.tokens), "key of an unread token"
        raw = request.tokens[first * size : num_blocks * size].tobytes()
        key = keys[-1] if keys else blake2b(request.salt, digest_size=KEY_SIZE).digest()
        stride = size * request.tokens.itemsize
        for at in range(0, len(raw), stride):
            key = blake2b(key + raw[at : at + stride], digest_size=KEY_SIZE).digest()
            keys.append(key)

    def match(self, request: Request, step: int) -> Prefix:
        """The longest prefix that is in the cache, or with the parent it was forked from; it leaves a token to compute.

        None where the prompt's logprobs are asked for: they take all of its logits.
        `step`: the step being planned. A parent seated in it has no content to copy yet.
        """
        size = self.block_size
        max_shared = 0 if request.is_scored else len(request.tokens) - 1
        blocks: Sequence[int] = self._find(request, max_shared // size)
        prefix = Prefix(len(blocks) * size, blocks, 0)
        parent = request.parent
        if parent is not None and parent.row and parent.first_step < step:
            num_tokens = min(max_shared, parent.num_computed)
            if num_tokens > prefix.num_tokens:
                whole, rest = divmod(num_tokens, size)
                prefix = Prefix(num_tokens, parent.blocks[:whole], parent.blocks[whole] if rest else 0)
        return prefix

    def _find(self, request: Request, max_blocks: int) -> list[int]:
        hit: list[int] = []
        block_of = self.pool.block_of
        for key in islice(request.keys, max_blocks):
            block = block_of.get(key)
            if block is None:
                break
            hit.append(block)
        return hit

    def try_admit(self, request: Request, prefix: Prefix, count: int, num_reserved: int) -> bool:
        """Give `request` the prefix and blocks for `count` tokens after it, and promise those for its other tokens.

        All its tokens must fit beside what is promised to others and `num_reserved` blocks for their growth.
        """
        num_shared = len(prefix.blocks)
        num_all = self.blocks_for(len(request.tokens))
        num_needed = num_all - num_shared + self.pool.count_unused(prefix.blocks)
        if num_needed > self.pool.num_free - self.num_promised - num_reserved:
            return False
        self.pool.share(prefix.blocks)
        num_now = self.blocks_for(prefix.num_tokens + count)
        request.blocks = array("i", prefix.blocks) + self.pool.take(num_now - num_shared)
        request.num_promised = num_all - num_now
        self.num_promised += request.num_promised
        request.num_computed = request.num_planned = prefix.num_tokens
        request.num_published = num_shared
        request.next_publish = (num_shared + 1) * self.block_size if self.enable_prefix_caching else NEVER
        return True

    def adopt(self, request: Request, parent: Request) -> tuple[array[int], array[int]]:
        """Let `request` hold what `parent`, as long as it, has computed: its full blocks, and a copy of the last.

        Returns (row, index, block) of what changed in its table, and (from, to) of the copy. It takes no new block: the
        last one, not full, is its own already.
        """
        num_full, rest = divmod(parent.num_computed, self.block_size)
        assert request.num_computed == parent.num_computed and len(request.blocks) == len(parent.blocks)
        changes, copies = ints(), ints()
        for index in range(num_full):
            if request.blocks[index] != parent.blocks[index]:
                changes.extend((request.row, index, parent.blocks[index]))
        self.pool.share(parent.blocks[:num_full])
        self.pool.release(reversed(request.blocks[:num_full]))
        request.blocks[:num_full] = parent.blocks[:num_full]
        if rest:
            copies.extend((parent.blocks[num_full], request.blocks[num_full]))
        request.num_published = parent.num_published
        if self.enable_prefix_caching:
            request.next_publish = (request.num_published + 1) * self.block_size
        return changes, copies

    def try_grow(self, request: Request, num_tokens: int, changes: array[int]) -> bool:
        """Blocks for the first `num_tokens` tokens; new ones go to `changes` as (row, index, block)."""
        first = len(request.blocks)
        num_new = -(-num_tokens // self.block_size) - first
        if num_new <= 0:
            return True
        if num_new > self.pool.num_free:
            return False
        new = self.pool.take(num_new)
        row = request.row
        for index, block in enumerate(new, first):
            changes.extend((row, index, block))
        request.blocks.extend(new)
        if request.num_promised:
            num_kept = min(num_new, request.num_promised)
            request.num_promised -= num_kept
            self.num_promised -= num_kept
        return True

    def publish(self, request: Request) -> None:
        """Offer the full blocks that are computed, and whose tokens were read, to later requests."""
        num_full = request.num_computed // self.block_size
        if num_full > len(request.keys):
            self.extend_keys(request, num_full)
        for index in range(request.num_published, num_full):
            self.pool.publish(request.blocks[index], request.keys[index])
        request.num_published = num_full
        request.next_publish = (num_full + 1) * self.block_size

    def publish_soon(self, request: Request) -> None:
        """Let `publish_some` do it, at the latest `release`: a thousand rows may fill a block in the same step."""
        request.next_publish = NEVER
        self._unpublished.append(request)

    def publish_some(self) -> None:
        """Publish for the requests that have waited longest, as many as keep the others from piling up."""
        num_now = max(MIN_PUBLISHED, len(self._unpublished) // 8)
        for _ in range(min(num_now, len(self._unpublished))):
            request = self._unpublished.popleft()
            if request.row:
                self.publish(request)

    def release(self, request: Request) -> None:
        """Give up all blocks; the tail of a chain is reused before its head, without which it cannot be found."""
        if self.enable_prefix_caching:
            self.publish(request)
        self.pool.release(reversed(request.blocks))
        self.num_promised -= request.num_promised
        request.num_promised = 0
        request.blocks = ints()

    def hold(self, blocks: Iterable[int]) -> None:
        """Keep `blocks`, in use or cached, beyond their requests until they are dropped."""
        for block in blocks:
            self.pool.share((block,))
            self._holds[block] = self._holds.get(block, 0) + 1

    def drop(self, blocks: Iterable[int]) -> None:
        """End one hold on each of `blocks`."""
        for block in blocks:
            assert self._holds.get(block, 0) > 0, f"block {block} is not held"
            self._holds[block] -= 1
            if not self._holds[block]:
                del self._holds[block]
            self.pool.release((block,))

    def check_invariants(self, requests: Iterable[Request]) -> None:
        """Assert exact reference counts, promises and keys, given all live requests."""
        ref_counts = array("i", [0]) * self.num_blocks
        num_promised = 0
        for request in requests:
            num_promised += request.num_promised
            for block in request.blocks:
                ref_counts[block] += 1
            assert not request.row or request.num_published * self.block_size <= request.num_computed
            assert len(request.keys) * self.block_size <= len(request.tokens), "key of an unread token"
        for block, num in self._holds.items():
            ref_counts[block] += num
        assert ref_counts[0] == 0, "the dummy block was handed out"
        assert num_promised == self.num_promised >= 0
        self.pool.check_invariants(ref_counts)
