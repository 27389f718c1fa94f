"""Request: what one sequence has, owes and holds. It knows no policy, clock or device.

    tokens   | prompt ............ | read outputs . | unknown | drafts |
    computed |----- applied -----> num_computed
    planned  |----- handed to steps, some in flight -----> num_planned

A request owes `num_owed` tokens of computation, whatever it is doing: a chunk of its prompt, one decode, a
verification of drafts, what a prefix hit left over, or everything again after a preemption.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from minillm.core.plan import RowParams, ints
from minillm.types import FinishReason

__all__ = ["NEVER", "Request"]

NEVER = 2**62
"""A step or position that is not reached."""


class Request:
    """One sequence, the scheduler's from `add` or `fork` until it ends. Times are seconds of the caller's clock."""

    __slots__ = (
        "arrival",
        "blocks",
        "drafts",
        "finish_reason",
        "first_planned",
        "first_step",
        "is_stepwise",
        "keys",
        "max_len",
        "max_tokens",
        "next_publish",
        "num_cached_tokens",
        "num_chunks",
        "num_computed",
        "num_overtaken",
        "num_planned",
        "num_preemptions",
        "num_promised",
        "num_prompt",
        "num_published",
        "num_unknown",
        "number",
        "params",
        "parent",
        "plan_limit",
        "priority",
        "rank",
        "row",
        "salt",
        "stop_token_ids",
        "tokens",
    )

    def __init__(
        self,
        number: int,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        params: RowParams,
        stop_token_ids: frozenset[int],
        priority: int = 0,
        arrival: float = 0.0,
        salt: bytes = b"",
        is_stepwise: bool = False,
    ) -> None:
        """`stop_token_ids` includes the model's end tokens unless they are ignored; a lower `priority` is served first;
        requests share cached prefixes only under an equal `salt`; `is_stepwise`: its next plan depends on its last
        result (drafts, a grammar, a beam), so it never runs a step ahead.
        """
        self.number = number
        self.tokens = array("i", prompt)
        self.num_prompt = len(self.tokens)
        self.max_tokens = max_tokens
        self.params = params
        self.stop_token_ids = stop_token_ids
        self.priority = priority
        self.arrival = arrival
        self.salt = salt
        self.is_stepwise = is_stepwise

        self.drafts: list[int] = []
        """Proposed tokens after the last one read; ignored while that is still unknown."""
        self.num_unknown = 0
        """Tokens sampled on the device and not yet read."""
        self.num_planned = 0
        """Positions handed to steps since it was seated, cached ones included."""
        self.num_computed = 0
        """Positions whose keys and values are in the cache, by results that were applied."""
        self.finish_reason: FinishReason | None = None

        self.rank = (priority, 0, number)
        """Place in the one total order: smaller is admitted first and preempted last."""
        self.max_len = self.num_prompt + max_tokens
        """Most tokens it can come to; the scheduler lowers it to what model and cache hold."""
        self.plan_limit = self.max_len - 1
        """Positions from here on are not planned. 0: closed until its result in flight is applied."""
        self.parent: Request | None = None
        """Whom it was forked from, until it is seated."""

        self.row = 0
        self.first_step = NEVER
        """Step that seated it; results of earlier steps are of an earlier seat, or of none."""
        self.blocks = ints()
        self.num_promised = 0
        """Blocks of its prompt that it was admitted for and has not taken yet."""
        self.keys: list[bytes] = []
        """Prefix-cache keys of its full blocks, as far as they are known."""
        self.num_published = 0
        """Leading blocks that were offered to the prefix cache."""
        self.next_publish = NEVER
        """Computed positions at which the next block can be offered."""

        self.first_planned: float | None = None
        self.num_cached_tokens = 0
        """Tokens found in the cache when it was first admitted."""
        self.num_chunks = 0
        self.num_preemptions = 0
        self.num_overtaken = 0
        """Requests that were admitted before it while it headed the queue."""

    @property
    def num_owed(self) -> int:
        """Tokens that steps have yet to be handed."""
        return len(self.tokens) + self.num_unknown + len(self.drafts) - self.num_planned

    @property
    def num_output(self) -> int:
        """Output tokens read."""
        return len(self.tokens) - self.num_prompt

    @property
    def is_closed(self) -> bool:
        """Whether its next plan waits for a result in flight."""
        return self.plan_limit == 0

    def is_stop_token(self, token: int) -> bool:
        """Whether sampling `token` ends it."""
        return token in self.stop_token_ids

    def reopen(self) -> None:
        """A result was applied and nothing is in flight: go on from the last token read; unverified positions lapse."""
        self.drafts = []
        self.num_unknown = 0
        self.num_planned = len(self.tokens) - 1
        self.plan_limit = self.max_len - 1

    def unseat(self) -> None:
        """Forget the row and all progress but the tokens read. Samples in flight are void: they will be drawn again."""
        self.reopen()
        self.num_planned = self.num_computed = 0
        self.row = 0
        self.first_step = NEVER
