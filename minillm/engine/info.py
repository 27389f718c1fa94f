"""EngineInfo: what a front end must know of an engine to prepare and check requests for it. Plain values, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minillm.core.budget import SchedulerLimits
from minillm.errors import RequestError
from minillm.types import SamplingParams, as_int, shown


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """An engine's sizes and end tokens."""

    limits: SchedulerLimits
    vocab_size: int
    eos_token_ids: tuple[int, ...]

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise RequestError if this request can never be served."""
        # A tenth of the loop's time where all is well: long prompts are checked while the device has nothing to do.
        is_plain = set(map(type, prompt)) == {int}
        if not is_plain or min(prompt) < 0 or max(prompt) >= self.vocab_size:
            for at, token in enumerate(prompt):
                number = as_int(token)
                if number is None or not 0 <= number < self.vocab_size:
                    raise RequestError(
                        f"prompt token {at} is {shown(token)}; token ids are integers from 0 to {self.vocab_size - 1}"
                    )
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            last = max(getattr(params, name) or (0,))
            if last >= self.vocab_size:
                raise RequestError(f"{name} has {last}; the last token id is {self.vocab_size - 1}")
        reason = self.limits.find_fault(len(prompt), params.max_tokens)
        if reason is not None:
            raise RequestError(reason)

    def stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        """Tokens that end a request: its own and, unless it ignores them, the model's."""
        return frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else self.eos_token_ids)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for another process."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineInfo:
        """What `as_dict` gave, perhaps through JSON or MessagePack."""
        limits = values["limits"] | {"tile_steps": tuple(values["limits"]["tile_steps"])}
        eos_token_ids = tuple(values["eos_token_ids"])
        return cls(limits=SchedulerLimits(**limits), vocab_size=values["vocab_size"], eos_token_ids=eos_token_ids)
