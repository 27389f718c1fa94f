"""Values that users see: sampling parameters in, outputs and timings out. Standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

from minillm.checks import (
    MAX_BIASED_TOKENS,
    as_float,
    as_int,
    check_biases,
    check_end_tokens,
    check_float,
    check_int,
    check_priority,
    check_strings,
    check_tokens,
    check_unicode,
    keep_plain,
    shown,
)
from minillm.errors import RequestError

__all__ = [
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSequence",
    "CompletionOutput",
    "FinishReason",
    "MAX_BIASED_TOKENS",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "Timings",
    "as_float",
    "as_int",
    "check_float",
    "check_int",
    "check_priority",
    "check_unicode",
    "shown",
]

MAX_SEED = 2**63 - 1
MAX_STOP_STRINGS = 64
MAX_BEAM_WIDTH = 64
MAX_LOGPROBS = 20
MAX_CHOICES = 1024
MAX_GRAMMAR_LETTERS = 65_536
MAX_COMPLETIONS = 128
MAX_BAD_WORDS = 128
MAX_TOKENIZED_BAD_WORDS = 2 * MAX_BAD_WORDS
"""Within a text a word begins with a space, which gives it other tokens."""
MAX_BAD_WORD_TOKENS = 16
MIN_TEMPERATURE = 1e-5
"""Below this a temperature is greedy: logits divided by less could overflow."""


class FinishReason(StrEnum):
    """Why a request ended. Each request ends exactly once."""

    STOP = "stop"  # an end token, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the model's or cache's last position
    ABORT = "abort"  # the caller withdrew it
    REJECTED = "rejected"  # refused after it was accepted into the queue
    ERROR = "error"  # this request's own computation failed (logits not finite)


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputsParams:
    """What an output must match from its first letter to its end; exactly one field, under vLLM's names.

    The output ends where it can go on no more, or where it may end and the model ends it; max_tokens can cut it short.
    """

    json: str | dict[str, Any] | None = None
    """A JSON schema."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    """A regular expression, matched as a whole; without look-around and back references."""
    choice: tuple[str, ...] | list[str] | None = None
    """One of these texts, at most 1,024."""
    grammar: str | None = None
    """A grammar in Lark's language; its first rule is start."""

    def __post_init__(self) -> None:
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                raise RequestError(f"structured_outputs.{name} must be a text, not {shown(getattr(self, name))}")
            check_unicode(f"structured_outputs.{name}", getattr(self, name) or "")
        if not isinstance(self.json_object, bool):
            raise RequestError(f"structured_outputs.json_object must be True or False, not {shown(self.json_object)}")
        if self.choice is not None:
            check_strings("structured_outputs.choice", self.choice, MAX_CHOICES)
        schema = self.schema
        given = (self.json, self.json_object or None, self.regex, self.choice or None, self.grammar)
        if sum(each is not None for each in given) != 1:
            raise RequestError("structured_outputs takes exactly one of json, json_object, regex, choice and grammar")
        size = sum(map(len, (schema or "", self.regex or "", self.grammar or "", *(self.choice or ()))))
        if size > MAX_GRAMMAR_LETTERS:
            raise RequestError(f"structured_outputs takes at most {MAX_GRAMMAR_LETTERS} letters, not {size}")

    @property
    def schema(self) -> str | None:
        """`json` as text. Raises RequestError if it is no JSON object."""
        if self.json is None:
            return None
        try:
            schema = json.loads(self.json) if isinstance(self.json, str) else self.json
            if isinstance(schema, dict):
                return json.dumps(schema)
        except (ValueError, TypeError, RecursionError):
            pass
        raise RequestError(f"structured_outputs.json must be a JSON schema, an object, not {shown(self.json)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens, under vLLM's names.

    What changes logits comes first: allowed_token_ids, bad_words, min_tokens, logit_bias, then the penalties; filters
    follow in the order temperature, top_k, top_p, min_p. A request left without a token to choose ends as error.
    """

    max_tokens: int = 256
    """Most tokens to generate, at least 1."""
    temperature: float = 1.0
    """Divides the logits; 0, or less than 1e-5, takes the most likely token (greedy)."""
    top_k: int = 0
    """Keep the k most likely tokens and their ties; 0 or -1 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches top_p, in (0, 1]."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one, in [0, 1]."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in prompt or output, multiplies negative ones; in [0.01, 100], 1 is off."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens in the output, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens in the output once per occurrence, in [-2, 2]."""
    logit_bias: dict[int, float] | None = None
    """Added to the logits of these tokens, each in [-100, 100]; at most 300 tokens."""
    bad_words: tuple[str, ...] | list[str] = ()
    """Words that the output must not hold, at most 128, each of at most 16 tokens."""
    allowed_token_ids: tuple[int, ...] | list[int] | None = None
    """Choose among these tokens only."""
    seed: int | None = None
    """Noise of this request, 0 to 2**63-1; None draws one. The same seed gives the same tokens in any company."""
    stop: tuple[str, ...] | list[str] | str = ()
    """End when one of these strings appears; it is not part of the text."""
    stop_token_ids: tuple[int, ...] | list[int] = ()
    """End when one of these tokens is sampled, beside the model's own end tokens."""
    logprobs: int | None = None
    """Report each output token's logprob and those of so many likeliest tokens, 0 to 20; None reports none."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, whose prefix is then computed and not taken from the cache."""
    structured_outputs: StructuredOutputsParams | None = None
    """What the output must match: a JSON schema, a regular expression, a choice or a grammar."""
    n: int = 1
    """Completions of the prompt, which is computed once, 1 to 128; completion i has the seed + i."""
    min_tokens: int = 0
    """No end token, stop token or stop string counts before this many output tokens, 0 to max_tokens."""
    ignore_eos: bool = False
    """Do not end at the model's end tokens (for benchmarks)."""

    def __post_init__(self) -> None:
        check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        check_float("temperature", self.temperature, 0.0, 100.0)
        check_int("top_k", self.top_k, -1, 2**31 - 1)
        check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        check_float("min_p", self.min_p, 0.0, 1.0)
        check_float("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        check_int("n", self.n, 1, MAX_COMPLETIONS)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.seed is not None:
            check_int("seed", self.seed, 0, MAX_SEED)
        keep_plain(self, ("max_tokens", "top_k", "min_tokens", "n", "logprobs", "prompt_logprobs", "seed"))
        check_strings("stop", self.stop_strings if isinstance(self.stop, str) else self.stop, MAX_STOP_STRINGS)
        check_strings("bad_words", self.bad_words, MAX_BAD_WORDS)
        check_end_tokens(self.stop_token_ids, self.ignore_eos)
        if self.allowed_token_ids is not None:
            check_tokens("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise RequestError("allowed_token_ids is empty: no token could be chosen; None allows all")
        if self.logit_bias is not None:
            check_biases(self.logit_bias)
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise RequestError(
                f"structured_outputs must be a StructuredOutputsParams, not {shown(self.structured_outputs)}"
            )
        if self.structured_outputs is not None and self.ignore_eos:
            raise RequestError("ignore_eos must be False with structured_outputs, whose end is the end token")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamSearchParams:
    """How to search for the likeliest continuations. Names of vLLM where it has one, rules of transformers."""

    beam_width: int = 4
    """Continuations that are followed, and returned, 1 to 64."""
    max_tokens: int = 256
    """Most tokens to generate, at least 1."""
    length_penalty: float = 1.0
    """A continuation's score is its logprob over its length to this power, in [-10, 10]: more favours longer ones."""
    early_stopping: bool | str = False
    """When to stop with beam_width continuations complete: True at once, False when the likeliest that goes on scores
    no better by its length so far, "never" when it could not at any length up to max_tokens."""
    stop_token_ids: tuple[int, ...] | list[int] = ()
    """A continuation is complete at one of these tokens, beside the model's own end tokens. beam_width times one more
    than there are of both is at most 1,024."""
    ignore_eos: bool = False
    """The model's end tokens complete nothing."""

    def __post_init__(self) -> None:
        check_int("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH)
        check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        check_float("length_penalty", self.length_penalty, -10.0, 10.0)
        keep_plain(self, ("beam_width", "max_tokens", "length_penalty"))
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise RequestError(f"early_stopping must be True, False or 'never', not {shown(self.early_stopping)}")
        check_end_tokens(self.stop_token_ids, self.ignore_eos)


@dataclass(slots=True, kw_only=True)
class Timings:
    """Where a request's time went; seconds on one monotonic clock, counts of tokens and steps."""

    arrival: float = 0.0
    first_planned: float | None = None
    token_times: list[float] = field(default_factory=list)
    """When each output token reached the host."""
    finished: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache when the request was first admitted."""
    num_chunks: int = 0
    """Steps that computed a part of the prompt."""
    num_preemptions: int = 0
    num_steps: int = 0
    """Steps from the one that first seated it to its last."""
    num_tokens_beside: int = 0
    """Tokens that those steps computed for other requests (and, after a preemption, for it a second time)."""
    num_verifications: int = 0
    """Steps that verified drafts."""
    num_drafts: int = 0
    """Drafts that were verified."""
    num_accepted_drafts: int = 0
    """Drafts that held."""

    def of_tokens(self, num_tokens: int) -> Timings:
        """The same for the first output tokens alone: drafts that hold behind a stop string are no output."""
        return replace(self, token_times=self.token_times[:num_tokens])

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the drafts that held; None if there were none."""
        return self.num_accepted_drafts / self.num_drafts if self.num_drafts else None

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens that a verification gained on average, the one that no draft stood for included; None without any."""
        return 1 + self.num_accepted_drafts / self.num_verifications if self.num_verifications else None

    @property
    def ttft(self) -> float | None:
        """Time to first token, seconds."""
        return self.token_times[0] - self.arrival if self.token_times else None

    @property
    def itl(self) -> list[float]:
        """Every gap between tokens, seconds."""
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def e2el(self) -> float | None:
        """End-to-end latency, seconds."""
        return None if self.finished is None else self.finished - self.arrival

    @property
    def tokens_per_second(self) -> float | None:
        """Output tokens over end-to-end latency."""
        return len(self.token_times) / self.e2el if self.e2el else None


class TokenScore(NamedTuple):
    """A token's logprob by the model's own logits, its rank (1 is the likeliest), and those of the likeliest tokens."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's logprob among all, by the logits that the model gave: before edits, temperature and filters."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One completion of a request."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: list[dict[int, Logprob]] | None = None
    """Per output token: its own, then the likeliest tokens'. None if not asked for."""

    @property
    def cumulative_logprob(self) -> float | None:
        """Sum of the output tokens' logprobs, if they were asked for."""
        if self.logprobs is None:
            return None
        return sum(each[token].logprob for token, each in zip(self.token_ids, self.logprobs, strict=True))


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """What a request produced: the first completion's fields, and all `completions`."""

    request_id: str
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    timings: Timings
    completions: list[CompletionOutput]
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """Per prompt token, None for the first; None if not asked for."""


@dataclass(slots=True, kw_only=True)
class BeamSequence:
    """One continuation that a beam search found."""

    text: str
    token_ids: list[int]
    score: float
    """Its logprob over its length to the power of length_penalty: the order of the sequences."""
    cumulative_logprob: float
    finish_reason: FinishReason


@dataclass(slots=True, kw_only=True)
class BeamSearchOutput:
    """The continuations of a prompt, best first."""

    request_id: str
    prompt_token_ids: list[int]
    sequences: list[BeamSequence]
    timings: Timings
