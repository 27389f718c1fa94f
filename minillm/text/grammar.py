"""Structured output: compiles what a request's text must match, and says which tokens may come next. No torch.

The grammars, and the masks of tokens that they allow, are llguidance's; here are the limits, and the words of errors.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLong
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from minillm.errors import RequestError
from minillm.text.tokenizer import Tokenizer
from minillm.types import StructuredOutputsParams

__all__ = ["GrammarCompiler", "Matcher", "fill_masks"]

MAX_SECONDS = 10.0
"""Time in which a grammar must be compiled. Its parts are bounded as well (llguidance's limits): no thread is lost."""
MAX_MASK_ITEMS = 5_000
"""Parser items that one mask may take, about 25 ms of everybody's step; a schema of 100 objects takes some 1,500."""
MAX_CACHED = 64
MASK_BITS = 32
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,16}"
"""Between the parts of JSON: without an end a model may write it for ever."""


class Matcher(Protocol):
    """How far a text is through its grammar (llguidance.LLMatcher)."""

    def consume_tokens(self, sampled_tokens: list[int]) -> bool:
        """Go on by these tokens; False, and an error from then on, if they do not match."""

    def consume_token(self, sampled_token: int) -> bool:
        """Go on by one token."""

    def rollback(self, num_tokens: int) -> bool:
        """Take the last tokens back."""

    def unsafe_compute_mask_ptr(self, trg_pointer: int, trg_byte_size: int) -> None:
        """Write the mask of tokens that may come next to memory."""

    def is_error(self) -> bool:
        """Whether it has failed, at a token or at a limit."""

    def deep_copy(self) -> Matcher:
        """Another one at the same place."""


class TokenTable:
    """The vocabulary as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self.eos_token_id, self.bos_token_id = eos_token_id, tokenizer.bos_token_id
        self.tokens = [tokenizer.piece(token, skip_special_tokens=False) for token in range(vocab_size)]
        self.special_token_ids = sorted({*tokenizer.special_ids, eos_token_id})
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of a text."""
        return self._tokenizer.encode(text.decode("utf-8", "replace"), add_special_tokens=False)


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and keeps the latest. Any thread may call it: the loop's need not wait."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, list(eos_token_ids)
        self._lock = Lock()
        self._compiled: OrderedDict[tuple[str, str], Future[Matcher]] = OrderedDict()
        self._pool = ThreadPoolExecutor(1, "grammar")
        self._table: Any = None

    def matcher(self, params: StructuredOutputsParams) -> Matcher:
        """A matcher at the beginning of the text. Raises RequestError, naming the field."""
        kind, grammar = written(params)
        if self._tokenizer is None:
            raise RequestError("structured_outputs takes a tokeniser, and this engine was made without one")
        if not self._eos_token_ids:
            raise RequestError("structured_outputs ends at the model's end token, and this model has none")
        with self._lock:
            future = self._compiled.get((kind, grammar))
            if future is None:
                future = self._compiled[kind, grammar] = self._pool.submit(self._compile, kind, grammar)
            self._compiled.move_to_end((kind, grammar))
            while len(self._compiled) > MAX_CACHED:
                self._compiled.popitem(last=False)
        try:
            return future.result(MAX_SECONDS).deep_copy()
        except TooLong:
            raise RequestError(
                f"structured_outputs.{kind} takes more than {MAX_SECONDS:.0f} s to compile; write a simpler one"
            ) from None

    def close(self) -> None:
        """Compile no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, kind: str, grammar: str) -> Matcher:
        try:
            import llguidance
        except ImportError:
            raise RequestError("structured_outputs needs llguidance: pip install 'minillm[structured]'") from None
        if self._table is None:
            assert self._tokenizer is not None
            table = TokenTable(self._tokenizer, self._vocab_size, self._eos_token_ids[0])
            wrapper = llguidance.TokenizerWrapper(table)
            self._table = llguidance.LLTokenizer(wrapper, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
        make = llguidance.LLMatcher
        try:
            if kind in ("json", "json_object"):
                source = make.grammar_from_json_schema(grammar, overrides={"whitespace_pattern": WHITESPACE})
            else:
                source = make.grammar_from_regex(grammar) if kind == "regex" else make.grammar_from_lark(grammar)
        except ValueError as error:
            raise RequestError(f"structured_outputs.{kind} cannot be used: {error}") from None
        limits = llguidance.LLParserLimits(step_max_items=MAX_MASK_ITEMS, verbose_errors=False)
        matcher: Matcher = make(self._table, source, log_level=0, limits=limits)
        if not fill_masks([(matcher, [])], self._vocab_size).any():
            reason = " ".join(make.validate_grammar(source, self._table, limits=limits).split())
            raise RequestError(f"structured_outputs.{kind} cannot be used: {reason[:300] or 'it matches no text'}")
        return matcher


def written(params: StructuredOutputsParams) -> tuple[str, str]:
    """Which field is set, and its grammar as text."""
    if params.json is not None:
        return "json", params.schema or ""
    if params.json_object:
        return "json_object", '{"type": "object"}'
    if params.regex is not None:
        return "regex", params.regex
    if params.grammar is not None:
        return "grammar", params.grammar
    return "choice", "start: " + " | ".join(json.dumps(choice) for choice in params.choice or ())


def fill_masks(entries: Sequence[tuple[Matcher, list[int]]], vocab_size: int) -> NDArray[np.int32]:
    """Masks of the tokens that may come next, and after each of some drafts: int32 [masks, vocab_size / 32].

    Bit i of word w is token 32 w + i. One that failed allows nothing; behind a wrong draft, all is allowed.
    """
    masks = np.full((sum(1 + len(drafts) for _, drafts in entries), -(-vocab_size // MASK_BITS)), -1, np.int32)
    at = 0
    for matcher, drafts in entries:
        num_consumed = 0
        for mask, draft in zip(masks[at:], [*drafts, None], strict=False):
            if matcher.is_error():
                mask[:] = 0
                break
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if matcher.is_error():  # at a limit
                mask[:] = 0
            if draft is None or not (mask[draft // MASK_BITS] >> draft % MASK_BITS) & 1:
                break
            num_consumed += matcher.consume_token(draft)
        matcher.rollback(num_consumed)
        at += 1 + len(drafts)
    return masks
