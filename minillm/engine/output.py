"""From tokens to text: one request's detokeniser and stop strings, and the RequestOutput at its end. No torch."""

from __future__ import annotations

from collections.abc import Sequence, Set

from minillm.engine.beams import BeamRun
from minillm.engine.engine import Engine, Generation
from minillm.text.detokenizer import Detokenizer
from minillm.text.stop import StopMatcher
from minillm.text.tokenizer import Tokenizer
from minillm.types import (
    BeamSearchOutput,
    BeamSequence,
    CompletionOutput,
    FinishReason,
    Logprob,
    RequestOutput,
    TokenScore,
)


class TextReader:
    """One completion's text as its tokens come: what is certain, up to a stop string."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop_strings: Sequence[str],
        stop_token_ids: Set[int],
        min_tokens: int = 0,
    ) -> None:
        """`min_tokens`: a stop string counts if it begins after so many."""
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._matcher, self.may_match = StopMatcher(stop_strings), bool(stop_strings)
        self._stop_token_ids = stop_token_ids
        self._num_unmatched = min_tokens

    @property
    def is_matched(self) -> bool:
        """Whether the text has ended at a stop string."""
        return self._matcher.is_matched

    def read(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Text that is certain once `tokens` are known, and how many they are up to the end of a stop string."""
        if not self.may_match:  # all at once costs much less
            return self._feed(*tokens), len(tokens)
        text = ""
        for num_read, token in enumerate(tokens, start=1):
            text += self._feed(token)
            if self.is_matched:
                return text, num_read
        return text, len(tokens)

    def finish(self) -> str:
        """What was held back, at the end of the tokens; nothing the second time."""
        return self._matcher.feed(self._detokenizer.finish()) + self._matcher.finish()

    def _feed(self, *tokens: int) -> str:
        """An end token is billed and reported, but is no text."""
        text = self._detokenizer.feed(*[token for token in tokens if token not in self._stop_token_ids])
        if self._num_unmatched:
            self._num_unmatched -= 1
            return text
        return self._matcher.feed(text)


class TextStream:
    """Turns a generation's tokens into text, and ends it at a stop string."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, generation: Generation, prompt: list[int]) -> None:
        self.generation = generation
        self._engine, self._tokenizer, self._prompt = engine, tokenizer, prompt
        params, stop_token_ids = generation.params, generation.request.stop_token_ids
        self._reader = TextReader(tokenizer, prompt, params.stop_strings, stop_token_ids, params.min_tokens)
        self._pieces: list[str] = []
        self.token_ids: list[int] = []
        self._num_taken = 0, 0

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the request ended, or None; a stop string counts even if its last token was the last one allowed."""
        reason = self.generation.finish_reason
        return FinishReason.STOP if reason is FinishReason.LENGTH and self._reader.is_matched else reason

    @property
    def is_done(self) -> bool:
        """Whether the request has ended."""
        return self.generation.finish_reason is not None

    @property
    def is_due(self) -> bool:
        """Whether the tokens that came are to be read now; others cost less when they are read together, at the end."""
        return self._reader.may_match or self.generation.finish_reason is not None

    def advance(self) -> None:
        """Take the new tokens, and end the request if they complete a stop string."""
        if not self._reader.is_matched:
            tokens = self.generation.take_new_tokens()
            text, num_read = self._reader.read(tokens)
            self._pieces.append(text)
            self.token_ids += tokens[:num_read]
        if self._reader.is_matched:
            self._engine.finish(self.generation, FinishReason.STOP)
        elif self.is_done:
            self._pieces.append(self._reader.finish())

    def take(self) -> tuple[str, list[int]]:
        """Text that is certain and tokens that came, since the last call."""
        self.advance()
        text, token_ids = "".join(self._pieces[self._num_taken[0] :]), self.token_ids[self._num_taken[1] :]
        self._num_taken = len(self._pieces), len(self.token_ids)
        return text, token_ids

    def completion(self, index: int) -> CompletionOutput:
        """The finished completion, the `index`-th of its prompt."""
        self.advance()
        text, scores = "".join(self._pieces), self.generation.scores[: len(self.token_ids)]
        is_scored = self.generation.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=self.token_ids,
            finish_reason=self.finish_reason,
            logprobs=[self._logprobs_of(score) for score in scores] if is_scored else None,
        )

    def output(self, request_id: str, others: Sequence[TextStream] = ()) -> RequestOutput:
        """The finished request; `others`: the further completions of its prompt."""
        completions = [stream.completion(i) for i, stream in enumerate((self, *others))]
        first, prompt_logprobs = completions[0], None
        if self.generation.params.prompt_logprobs is not None:
            prompt_scores = self.generation.prompt_scores
            prompt_logprobs = [None if score is None else self._logprobs_of(score) for score in prompt_scores]
        return RequestOutput(
            request_id=request_id,
            prompt_token_ids=self._prompt,
            text=first.text,
            token_ids=first.token_ids,
            finish_reason=first.finish_reason,
            timings=self.generation.timings.of_tokens(len(first.token_ids)),
            completions=completions,
            logprobs=first.logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def _logprobs_of(self, score: TokenScore) -> dict[int, Logprob]:
        """A token's logprob, then those of the likeliest, with what each would add to the text."""
        found = {score.token: (score.logprob, score.rank)}
        for rank, (token, logprob) in enumerate(score.top, start=1):
            found.setdefault(token, (logprob, rank))
        return {
            token: Logprob(logprob, rank, self._tokenizer.decode([token], skip_special_tokens=False))
            for token, (logprob, rank) in found.items()
        }


def beam_output(request_id: str, tokenizer: Tokenizer, prompt: list[int], run: BeamRun) -> BeamSearchOutput:
    """A finished beam search, with its continuations as text."""
    sequences = []
    for score, logprob, tokens in run.search.hypotheses.finished:
        reader = TextReader(tokenizer, prompt, (), run.stop_token_ids)
        text = reader.read(tokens)[0] + reader.finish()
        is_stop = tokens[-1] in run.stop_token_ids
        sequences.append(
            BeamSequence(
                text=text,
                token_ids=list(tokens),
                score=score,
                cumulative_logprob=logprob,
                finish_reason=FinishReason.STOP if is_stop else FinishReason.LENGTH,
            )
        )
    return BeamSearchOutput(request_id=request_id, prompt_token_ids=prompt, sequences=sequences, timings=run.timings)
