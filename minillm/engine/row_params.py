"""From a user's SamplingParams to the numbers of a row: words as tokens, defaults decided. It knows no requests."""

from __future__ import annotations

from minillm.core.plan import RowEdits, RowParams
from minillm.engine.info import EngineInfo
from minillm.errors import RequestError
from minillm.text.tokenizer import Tokenizer
from minillm.types import MAX_BAD_WORD_TOKENS, MIN_TEMPERATURE, SamplingParams, shown

__all__ = ["RowParamsMaker"]


class RowParamsMaker:
    """Makes the parameters of rows for one model."""

    def __init__(self, info: EngineInfo, tokenizer: Tokenizer | None) -> None:
        self._info, self._tokenizer = info, tokenizer

    def check(self, params: SamplingParams) -> None:
        """Raise RequestError for words that cannot be banned; `EngineInfo.check` does all that needs no text."""
        for word in params.bad_words:
            self._tokens_of(word)

    def of(self, params: SamplingParams, num_prompt: int, seed: int) -> RowParams:
        """Parameters that `check` has nothing against, for a prompt of `num_prompt` tokens."""
        edits = RowEdits(
            repetition_penalty=float(params.repetition_penalty),
            presence_penalty=float(params.presence_penalty),
            frequency_penalty=float(params.frequency_penalty),
            biases=tuple((int(token), float(bias)) for token, bias in (params.logit_bias or {}).items()),
            allowed=None if params.allowed_token_ids is None else tuple(int(t) for t in params.allowed_token_ids),
            bad_words=tuple(tokens for word in params.bad_words for tokens in self._tokens_of(word)),
            has_grammar=params.structured_outputs is not None,
        )
        is_edited = edits != RowEdits() or params.min_tokens > 0
        if is_edited:
            stops = tuple(sorted(self._info.stop_token_ids(params)))
            min_len = num_prompt + int(params.min_tokens)
            edits = edits._replace(num_prompt=num_prompt, min_len=min_len, stop_token_ids=stops)
        return RowParams(
            temperature=params.temperature if params.temperature >= MIN_TEMPERATURE else 0.0,
            top_k=max(0, params.top_k),
            top_p=params.top_p,
            min_p=params.min_p,
            seed=seed,
            edits=edits if is_edited else None,
            num_logprobs=-1 if params.logprobs is None else int(params.logprobs),
            num_prompt_logprobs=-1 if params.prompt_logprobs is None else int(params.prompt_logprobs),
        )

    def _tokens_of(self, word: str) -> list[tuple[int, ...]]:
        """A word's tokens at the beginning of a text and, if a space before it changes its first one alone, within."""
        if self._tokenizer is None:
            raise RequestError("bad_words takes a tokeniser, and this engine was made without one")
        ways: list[tuple[int, ...]] = []
        for text in (word.lstrip(), f" {word.lstrip()}"):
            tokens = tuple(self._tokenizer.encode(text, add_special_tokens=False))
            if ways and (tokens[0] == ways[0][0] or len(tokens) != len(ways[0])):
                continue
            if not tokens or len(tokens) > MAX_BAD_WORD_TOKENS or max(tokens) >= self._info.vocab_size:
                raise RequestError(f"bad_words has {shown(word)}, which is not 1 to {MAX_BAD_WORD_TOKENS} tokens")
            ways.append(tokens)
        return ways
