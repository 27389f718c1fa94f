"""A device that computes hashes: it has a paged cache and per-row state, and obeys plans exactly as a real one would.

The "keys and values" of a position are a hash of what the cache holds for the position before it and of the token, and
a sample is a hash of all that the row's block table leads to. So any wrong block, stale slot, missing copy or wrong
last token changes the output. Copies are read before any is written, and rows run last to first, so nothing may lean
on the order within a step.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from minillm.core.plan import RowParams, StepPlan, StepResult, ints

VOCAB = 40
EOS = 0


def params_of(seed: int) -> RowParams:
    return RowParams(1.0, 0, 1.0, 0.0, seed)


def content(before: int, token: int) -> int:
    """What the cache holds for a token after a position that holds `before`."""
    return hash((before, token))


def sample(contents: Sequence[int], seed: int) -> int:
    """The token after those whose contents are given."""
    return (hash((seed, *contents)) >> 5) % VOCAB


class Reference:
    """The naive engine: one sequence, no cache."""

    def __init__(self, tokens: Sequence[int], seed: int) -> None:
        self.tokens, self.seed = list(tokens), seed
        self._contents: list[int] = []

    def step(self) -> int:
        """Generate one token."""
        for token in self.tokens[len(self._contents) :]:
            self._contents.append(content(self._contents[-1] if self._contents else 1, token))
        self.tokens.append(sample(self._contents, self.seed))
        return self.tokens[-1]


def generate(prompt: Sequence[int], seed: int, max_tokens: int, stop_token_ids: frozenset[int]) -> list[int]:
    """The output that a request must have."""
    reference = Reference(prompt, seed)
    while max_tokens and reference.step() not in stop_token_ids:
        max_tokens -= 1
        if not max_tokens:
            break
    return reference.tokens[len(prompt) :]


class FakeRunner:
    """Runs plans in the order of `run`; keeping results back for a while is up to the caller."""

    def __init__(self, num_blocks: int, block_size: int, num_rows: int) -> None:
        self.block_size = block_size
        self.slots = [-1] * (num_blocks * block_size)
        self.tables: list[list[int] | None] = [None] * (num_rows + 1)
        self.seeds = [0] * (num_rows + 1)
        self.last_tokens: list[int | None] = [None] * (num_rows + 1)

    def run(self, plan: StepPlan, failing: Callable[[int], bool] = lambda request: False) -> StepResult:
        """One step; `failing` names the requests whose logits are to be not finite."""
        self._apply_changes(plan)
        works = list(plan.works())
        gains: list[list[int]] = [[]] * len(works)
        failed = ints()
        for i, work in reversed(list(enumerate(works))):
            gains[i] = self._run_row(work.row, work.start, work.count, work.num_samples, work.tokens)
            assert work.num_logits >= work.num_samples
            if work.num_samples and failing(work.request):
                failed.append(i)
                gains[i] = []
        counts = array("i", [len(gained) for gained in gains])
        return StepResult(plan.step, counts, array("i", [t for gained in gains for t in gained]), failed)

    def _apply_changes(self, plan: StepPlan) -> None:
        for row in plan.freed:
            assert row and self.tables[row] is not None, "freed a row that has no request"
            self.tables[row] = None
        for seat in plan.seats:
            assert seat.row and self.tables[seat.row] is None, "seated on a row in use"
            self.tables[seat.row] = list(seat.blocks)
            self.seeds[seat.row], self.last_tokens[seat.row] = seat.params.seed, None
        for row, index, block in zip(plan.blocks[::3], plan.blocks[1::3], plan.blocks[2::3], strict=True):
            table = self._table(row)
            assert index <= len(table), "a gap in a block table"
            table[index : index + 1] = [block]
        size = self.block_size
        sources, targets = plan.copies[::2], plan.copies[1::2]
        assert len({*targets}) == len(targets) and not {*targets} & {*sources}, "copies depend on their order"
        copied = [self.slots[block * size : (block + 1) * size] for block in sources]
        for block, contents in zip(targets, copied, strict=True):
            self.slots[block * size : (block + 1) * size] = contents

    def _run_row(self, row: int, start: int, count: int, num_samples: int, tokens: Sequence[int]) -> list[int]:
        if not tokens:
            last = self.last_tokens[row]
            assert count == 1 and last is not None, "the device has no token for this row"
            tokens = (last,)
        assert len(tokens) == count > 0
        table, size = self._table(row), self.block_size
        assert start + count <= len(table) * size, "a token without a slot"
        seen = [slot for block in table for slot in self.slots[block * size : (block + 1) * size]][:start]
        for position, token in enumerate(tokens, start):
            seen.append(content(seen[-1] if seen else 1, token))
            self.slots[table[position // size] * size + position % size] = seen[-1]
        if not num_samples:
            return []
        gained = [sample(seen[: start + count - num_samples + 1], self.seeds[row])]
        for i in range(count - num_samples + 1, count):  # drafts, kept while they equal the samples
            if tokens[i] != gained[-1]:
                break
            gained.append(sample(seen[: start + i + 1], self.seeds[row]))
        self.last_tokens[row] = gained[-1]
        return gained

    def _table(self, row: int) -> list[int]:
        table = self.tables[row]
        assert row and table is not None, "a row that has no request"
        assert 0 not in table, "the dummy block is in a table"
        return table
