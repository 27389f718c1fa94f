"""A small model drafts: each guess is a short generation on a scheduler, cache and runner of its own.

It samples as the large model does, after the same penalties and bans and with the noise of the same seed and position,
so guesses agree as often as the two models do (a grammar alone it does not follow). What it computed for a request is
found again in its prefix cache, but for the tokens since the last full block. It knows of the large model only the
requests' tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

from minillm.core.plan import RowParams
from minillm.core.request import Request
from minillm.core.scheduler import Scheduler
from minillm.runtime.runner import Pending, Runner

__all__ = ["DraftModel"]


class DraftModel:
    """Guesses of one small model for the requests of an engine."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        """`scheduler`: with a prefix cache; both are nobody else's."""
        self._scheduler, self._runner = scheduler, runner
        self._keys: dict[int, list[bytes]] = {}

    def propose(self, wanted: Mapping[Request, int]) -> dict[Request, list[int]]:
        """As many drafts as wanted, or fewer where a text ends; none for a request too long for the small model."""
        twins = {request: self._twin(request, num) for request, num in wanted.items()}
        asked = {request: twin for request, twin in twins.items() if self._try_add(twin)}
        self._run()
        return {request: list(twin.tokens[twin.num_prompt :]) for request, twin in asked.items()}

    def forget(self, request: Request) -> None:
        """The request ended."""
        self._keys.pop(request.number, None)

    def _twin(self, request: Request, num_drafts: int) -> Request:
        twin = Request(
            request.number,
            request.tokens,
            max_tokens=num_drafts,
            params=drafting_params(request.params),
            stop_token_ids=request.stop_token_ids,
            priority=request.priority,
            salt=request.salt,
        )
        twin.keys = self._keys.get(request.number, [])
        return twin

    def _try_add(self, twin: Request) -> bool:
        if self._scheduler.check(twin.num_prompt, twin.max_tokens) is not None:
            return False
        self._scheduler.add(twin)
        self._keys[twin.number] = twin.keys[:]  # those of tokens that are no guesses
        return True

    def _run(self) -> None:
        """The overlapped loop, to the end of all twins."""
        scheduler, in_flight = self._scheduler, None
        while scheduler.has_work or in_flight is not None:
            plan = scheduler.schedule(0.0)
            behind: Pending | None = None if plan is None else self._runner.submit(plan)
            if in_flight is not None:
                scheduler.update(in_flight[0], in_flight[1].wait())
            in_flight = None if plan is None or behind is None else (plan, behind)


def drafting_params(params: RowParams) -> RowParams:
    """A row's own parameters, but for what is reported beside its tokens and for masks that only its engine makes."""
    edits = None if params.edits is None else params.edits._replace(has_grammar=False)
    return params._replace(edits=edits, num_logprobs=-1, num_prompt_logprobs=-1)
