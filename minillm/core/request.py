"""Request: what one sequence has, owes and holds. It knows no policy, clock or device.

    tokens   | prompt ............ | read outputs . | unknown | drafts |
    computed |----- applied -----> num_computed
    planned  |----- handed to steps, some in flight -----> num_planned

A request owes `num_owed` tokens of computation, whatever it is doing: a chunk of its prompt, one decode, a
verification of drafts, what a prefix hit left over, or everything again after a preemption.

Steps are planned before the results of earlier ones are known. A row is *open* if its next plan depends only on how
many tokens it has, not which: it is planned up to position `plan_limit` with tokens unread. A *closed* row
(`plan_limit` 0) waits for the result in flight: its drafts may be rejected, or a grammar needs the token.
Each time a request is seated it starts over, and `first_step` tells the results of this seat from those of an
earlier one. `rank` orders all requests: of decodes and of prompts, half done or waiting, the smaller is served first,
and it is preempted last. A request is admitted when the cache can hold all its tokens, but takes a chunk's blocks at a
time: the rest is promised to it, and newcomers are admitted only on blocks that are not promised.
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

    __slots__ = {
        # What was asked for.
        "number": "never used again",
        "tokens": "array('i'): the prompt, then the output tokens read",
        "num_prompt": "leading tokens that were given",
        "max_tokens": "most output tokens asked for",
        "params": "numeric sampling parameters, for the device",
        "stop_token_ids": "sampling one of them ends it; includes the model's end tokens unless they are ignored",
        "priority": "lower is served first, equal ones by arrival and length (`queue.py`)",
        "arrival": "when it came, in seconds",
        "salt": "bytes: prefixes are shared only under an equal salt",
        "is_streamed": "somebody reads its tokens as they come, and wants short steps while it decodes",
        "is_shown": "the device is told its tokens when it is seated: its parameters depend on them",
        "is_scored": "logprobs of its prompt are asked for, which take all logits and no cached prefix",
        "is_stepwise": "its next plan depends on its last result (drafts, a grammar, a beam): it never runs ahead",
        # Where it stands.
        "drafts": "proposed tokens after the last one read; dropped if that is still unknown",
        "num_unknown": "tokens sampled on the device and not yet read",
        "num_planned": "positions handed to steps since it was seated, cached ones included",
        "num_computed": "positions whose keys and values are in the cache, by results that were applied",
        "finish_reason": "None until it ends",
        "rank": "(priority, place in line, number), from `add` on: a smaller one is served first and preempted last",
        "max_len": "most tokens, output included, it can come to; the scheduler lowers it to what model and cache hold",
        "plan_limit": "positions from here on are not planned; 0: closed until its result in flight is applied",
        "parent": "whom it was forked from, until it is seated",
        # What it has.
        "row": "its seat; 0: none",
        "first_step": "the step that seated it: results of earlier steps are of an earlier seat",
        "blocks": "array('i'): blocks of the cache, that of positions i * block_size onwards at index i",
        "num_promised": "blocks of its tokens that it was admitted for and has not taken yet",
        "keys": "prefix-cache keys of its full blocks, as far as they are known",
        "num_published": "leading blocks that were offered to the prefix cache",
        "next_publish": "computed positions at which the next block can be offered",
        # What became of it.
        "first_planned": "when it was first seated, in seconds; None before",
        "num_cached_tokens": "tokens found in the cache when it was first seated",
        "num_chunks": "steps that computed a part of its prompt, or of what a preemption left to compute again",
        "num_preemptions": "times it lost its seat, and with it all that was not in the prefix cache",
        "num_overtaken": "requests that were admitted before it while it headed the queue",
    }

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
        is_streamed: bool = True,
    ) -> None:
        self.number = number
        self.tokens = array("i", prompt)
        self.num_prompt = len(self.tokens)
        self.max_tokens = max_tokens
        self.params = params
        self.stop_token_ids = stop_token_ids
        self.priority = priority
        self.arrival = arrival
        self.salt = salt
        self.is_shown = params.needs_tokens
        self.is_scored = params.num_prompt_logprobs >= 0
        self.is_stepwise = is_stepwise
        self.is_streamed = is_streamed

        self.drafts: list[int] = []
        self.num_unknown = 0
        self.num_planned = 0
        self.num_computed = 0
        self.finish_reason: FinishReason | None = None
        self.rank = (priority, 0, number)
        self.max_len = self.num_prompt + max_tokens
        self.plan_limit = self.max_len - 1
        self.parent: Request | None = None

        self.row = 0
        self.first_step = NEVER
        self.blocks = ints()
        self.num_promised = 0
        self.keys: list[bytes] = []
        self.num_published = 0
        self.next_publish = NEVER

        self.first_planned: float | None = None
        self.num_cached_tokens = 0
        self.num_chunks = 0
        self.num_preemptions = 0
        self.num_overtaken = 0

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

    @property
    def is_decoding(self) -> bool:
        """Whether the next plan computes its last token, with nothing of it in flight: drafts may stand behind it."""
        return self.row > 0 and self.num_unknown == 0 and self.num_planned == len(self.tokens) - 1

    def is_stop_token(self, token: int) -> bool:
        """Whether sampling `token` ends it."""
        return token in self.stop_token_ids

    def accept(self, tokens: array[int]) -> FinishReason | None:
        """Append what a closed row gained, up to its end, and reopen it; why it ends, or None."""
        reason: FinishReason | None = None
        for token in tokens:
            self.tokens.append(token)
            if token in self.stop_token_ids:
                reason = FinishReason.STOP
            elif len(self.tokens) >= self.max_len:
                reason = FinishReason.LENGTH
            if reason is not None:
                break
        self.reopen()
        self.num_computed = self.num_planned
        return reason

    def hold(self) -> None:
        """Take back the last token, for somebody else to choose, and wait for it. Nothing is in flight."""
        assert not self.num_unknown, "held with a sample in flight"
        self.tokens.pop()
        self.plan_limit = 0

    def resume(self, token: int) -> None:
        """Go on with the token that was chosen, after `hold`; one without a row is computed anew in any case."""
        self.tokens.append(token)
        if self.row:
            self.reopen()

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
