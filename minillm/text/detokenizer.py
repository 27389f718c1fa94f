"""Tokens to text as they come: never half a character, constant work per token. It knows bytes, not models."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

__all__ = ["Detokenizer", "PieceSource"]


class PieceSource(Protocol):
    """What a detokeniser needs of a tokeniser."""

    @property
    def drops_first_space(self) -> bool:
        """Whether a text's first space is the encoder's own."""

    def piece(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        """The bytes that a token adds to the text."""


class Detokenizer:
    """One text, some tokens at a time. The pieces of all tokens, and of `finish`, add up to `decode` of all tokens."""

    def __init__(
        self, tokenizer: PieceSource, preceding: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        """`preceding`: tokens before the text, such as a prompt; after them a first space is the text's own."""
        self._tokenizer, self._skips = tokenizer, skip_special_tokens
        self._drops_space = tokenizer.drops_first_space and not preceding
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, *token_ids: int) -> str:
        """Text that is certain once these tokens are known."""
        piece, skips = self._tokenizer.piece, self._skips
        pieces = [piece(token_id, skip_special_tokens=skips) for token_id in token_ids]
        return self._trimmed(self._decoder.decode(b"".join(pieces)))

    def finish(self) -> str:
        """The rest: a replacement character if the last one never became whole."""
        return self._trimmed(self._decoder.decode(b"", True))

    def _trimmed(self, text: str) -> str:
        if text and self._drops_space:
            self._drops_space = False
            return text.removeprefix(" ")
        return text
