"""Logprobs in the two forms of OpenAI's API. It knows no engine: scores come as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from minillm.text.tokenizer import Tokenizer
from minillm.types import TokenScore

__all__ = ["chat_logprobs", "completion_logprobs"]

LEAST = -9999.0
"""In place of minus infinity, which JSON does not have."""


def piece_of(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes that stand for a token, special or not."""
    return tokenizer.piece(token, skip_special_tokens=False)


def text_of(tokenizer: Tokenizer, token: int) -> str:
    """The same as text."""
    return piece_of(tokenizer, token).decode("utf-8", "replace")


def finite(logprob: float) -> float:
    """A number that JSON has."""
    return max(LEAST, logprob)


def chat_logprobs(tokenizer: Tokenizer, scores: Iterable[TokenScore]) -> dict[str, Any]:
    """Of a chat's message: a list of tokens, each with the likeliest ones."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        piece = piece_of(tokenizer, token)
        return {"token": piece.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(piece)}

    content = [
        entry(score.token, score.logprob) | {"top_logprobs": [entry(*each) for each in score.top]} for score in scores
    ]
    return {"content": content, "refusal": None}


def likeliest(tokenizer: Tokenizer, score: TokenScore) -> dict[str, float]:
    """The likeliest tokens by text, and the token itself; where texts are equal (parts of characters) the likelier."""
    found: dict[str, float] = {}
    for token, logprob in (*score.top, (score.token, score.logprob)):
        found.setdefault(text_of(tokenizer, token), finite(logprob))
    return found


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], scores: Sequence[TokenScore | None], start: int
) -> dict[str, Any]:
    """Of a completion: columns. `start`: where the first token's text begins; the prompt's first has no score."""
    texts = [text_of(tokenizer, token) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(start)
        start += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [None if score is None else finite(score.logprob) for score in scores],
        "top_logprobs": [None if score is None else likeliest(tokenizer, score) for score in scores],
        "text_offset": offsets,
    }
