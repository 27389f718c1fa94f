"""What edited rows keep on the device, and their edited scores: penalties, biases, bans, masks. It knows no requests.

A row is edited if its seat's parameters say so; all others pay nothing. State follows positions alone, so nothing need
come to the host: a step writes its input tokens at their positions, and counts those up to its first sampled position,
which are certain by then. Drafts behind it are written as well and overwritten if they do not hold.

    history   | prompt, outputs counted ......... | input | draft | draft |
    position                                              first: samples at it and behind each draft

Shapes: S seats, P words of a profile, V vocabulary, N positions, L rows of logits, K edited ones, M masks of grammars,
E edited rows of the batch, T tokens.
"""

from __future__ import annotations

from functools import cached_property
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from minillm.core.plan import RowEdits, Seat, StepPlan
from minillm.kernels.edits_reference import NO_TOKEN, NUM_EDIT_COLUMNS, Profile
from minillm.runtime.batching import EditWords, column, places_of
from minillm.runtime.rows import Ints
from minillm.types import MAX_BAD_WORD_TOKENS, MAX_BIASED_TOKENS, MAX_TOKENIZED_BAD_WORDS

NOTHING = np.zeros(0, np.int32)


def profile_of(vocab_size: int) -> Profile:
    """The layout for a vocabulary."""
    mask = -(-vocab_size // 32)
    bad_words = MAX_TOKENIZED_BAD_WORDS * MAX_BAD_WORD_TOKENS
    sizes = (0, 3, 4, MAX_BIASED_TOKENS, MAX_BIASED_TOKENS, bad_words, mask, mask)
    return Profile._make([*np.cumsum(sizes).tolist(), MAX_BAD_WORD_TOKENS])


class LogitEdits:
    """Edits by seat, all on the device but for what decides which of it is needed."""

    def __init__(self, num_seats: int, vocab_size: int, num_positions: int, device: torch.device) -> None:
        self.vocab_size, self.num_positions, self.device = vocab_size, num_positions, device
        self.profile = profile_of(vocab_size)
        # Host state: who is edited, who by a grammar, and up to which position tokens are counted.
        self.is_edited_S = np.zeros(num_seats, bool)
        self.has_grammar_S = np.zeros(num_seats, bool)
        self.num_counted_S = np.zeros(num_seats, np.int32)

    @staticmethod
    def num_bytes(num_seats: int, vocab_size: int, num_positions: int) -> int:
        """Memory of the device state, allocated when the first edited row comes."""
        return num_seats * 4 * (profile_of(vocab_size).size + vocab_size + num_positions)

    @cached_property
    def profiles_SP(self) -> Tensor:
        """Parameters of each seat's edits."""
        return self._zeros(self.profile.size)

    @cached_property
    def counts_SV(self) -> Tensor:
        """Twice a token's occurrences in the output, plus 1 if it is in the prompt."""
        return self._zeros(self.vocab_size)

    @cached_property
    def history_SN(self) -> Tensor:
        """Tokens by position."""
        return self._zeros(self.num_positions)

    def words(self, plan: StepPlan, order: Ints) -> EditWords | None:
        """Note the plan's new seats, and lay out what its edits need; None if they need nothing.

        `order`: planned row of each row of the batch.
        """
        for seat in plan.seats:
            edits = seat.params.edits
            self.is_edited_S[seat.row] = edits is not None
            self.has_grammar_S[seat.row] = edits is not None and edits.has_grammar
        if not np.count_nonzero(self.is_edited_S):  # faster than any()
            return None
        seated, num_prompt = self._seat_words([seat for seat in plan.seats if seat.params.edits is not None])
        columns, num_masks = self._step_columns(plan, order)
        if not seated[0].size and not columns.size:
            return None
        return EditWords(
            sections=(*seated, columns.reshape(-1)),
            num_prompt=num_prompt,
            num_rows=columns.shape[1],
            num_masks=num_masks,
        )

    def seat(self, seats: Tensor, profiles: Tensor, known: Tensor, num_prompt: int) -> None:
        """Apply the new seats' words: known tokens come with those of prompts, `num_prompt`, in front."""
        self.profiles_SP[seats] = profiles.view(-1, self.profile.size)
        known_seats, positions, tokens = known.view(3, -1).long()
        self.history_SN[known_seats, positions] = tokens.int()
        self.counts_SV.index_fill_(0, seats.long(), 0)  # to assign a number would wait for the device
        flat, places = self.counts_SV.view(-1), known_seats * self.vocab_size + tokens
        flat.index_add_(0, places[num_prompt:], torch.full_like(tokens[num_prompt:], 2, dtype=torch.int32))
        flat[places[:num_prompt]] |= 1

    def note(self, ops: ModuleType, columns_7K: Tensor, last_tokens_S: Tensor) -> None:
        """Keep and count the input tokens of a step's edited rows, some of which the device alone has."""
        ops.note_inputs(columns_7K, last_tokens_S=last_tokens_S, history_SN=self.history_SN, counts_SV=self.counts_SV)

    def scores(self, ops: ModuleType, logits_LV: Tensor, columns_7K: Tensor, masks_MW: Tensor | None) -> Tensor:
        """Edited fp32 logits [K, V] of the step's edited rows."""
        scores_KV: Tensor = ops.edit_logits(
            logits_LV,
            columns_7K,
            profiles_SP=self.profiles_SP,
            profile=self.profile,
            counts_SV=self.counts_SV,
            history_SN=self.history_SN,
            masks_MW=masks_MW,
        )
        return scores_KV

    def padding(self) -> LogitEdits:
        """Edits of one seat that has none, for the kernels of a step before there is an edited row."""
        return LogitEdits(1, self.vocab_size, self.num_positions, self.device)

    def _seat_words(self, seats: list[Seat]) -> tuple[tuple[Ints, Ints, Ints], int]:
        """Seats [n], profiles [n P], known seats, positions and tokens [3 T]; and how many of these are of prompts."""
        if not seats:
            return (NOTHING, NOTHING, NOTHING), 0
        profiles, known = [], []
        for seat in seats:
            assert seat.params.edits is not None and seat.tokens is not None
            profiles.append(self._profile_words(seat.params.edits))
            tokens = column(seat.tokens)
            self.num_counted_S[seat.row] = len(tokens)
            is_output = np.arange(len(tokens)) >= seat.params.edits.num_prompt
            known.append(np.stack([np.full(len(tokens), seat.row), np.arange(len(tokens)), tokens, is_output]))
        flat = np.concatenate(known, axis=1).astype(np.int32)
        flat = flat[:, np.argsort(flat[3], kind="stable")]  # prompts' tokens in front
        rows = np.array([seat.row for seat in seats], np.int32)
        return (rows, np.concatenate(profiles), flat[:3].reshape(-1)), int((flat[3] == 0).sum())

    def _step_columns(self, plan: StepPlan, order: Ints) -> tuple[Ints, int]:
        """Columns of the edited rows of logits [7, K] (`edits_reference`), and the masks that they wait for."""
        rows, num_samples = column(plan.rows), column(plan.num_samples)
        rows_R, num_R = rows[order], num_samples[order]
        at_E = np.flatnonzero(self.is_edited_S[rows_R] & (num_R > 0))
        if not at_E.size:
            return np.zeros((NUM_EDIT_COLUMNS, 0), np.int32), 0
        entries_E, seats_E, num_E = order[at_E], rows_R[at_E], num_R[at_E]
        firsts_E = column(plan.starts)[entries_E] + column(plan.counts)[entries_E] - num_E + 1
        columns = np.empty((NUM_EDIT_COLUMNS, len(at_E)), np.int32)
        columns[0] = np.cumsum(num_R)[at_E] - num_E
        columns[1] = seats_E
        columns[2:4] = firsts_E
        columns[4] = NO_TOKEN
        columns[5] = counted_E = self.num_counted_S[seats_E]
        columns[6] = NO_TOKEN
        self.num_counted_S[seats_E] = np.maximum(counted_E, firsts_E)
        num_masks = 0
        has_grammar_E = self.has_grammar_S[seats_E]
        if has_grammar_E.any():
            ends = np.cumsum(num_samples * self.has_grammar_S[rows])
            columns[6] = np.where(has_grammar_E, ends[entries_E] - num_E, NO_TOKEN)
            num_masks = int(ends[-1])
        owners: Ints | slice = slice(None)
        within: Ints | int = 0
        if len(at_E) < num_E.sum():  # drafts
            owners, within = places_of(num_E)
            columns = columns[:, owners]
            columns[[0, 2]] += within
            columns[6] += within * has_grammar_E[owners]
        if plan.tokens:
            given = column(plan.num_tokens)
            has_tokens = (given[entries_E] > 0)[owners]
            places = (np.cumsum(given)[entries_E] - num_E)[owners] + within
            columns[4, has_tokens] = column(plan.tokens)[places[has_tokens]]
        return columns, num_masks

    def _profile_words(self, edits: RowEdits) -> Ints:
        """A seat's parameters as words."""
        words, at = np.zeros(self.profile.size, np.int32), self.profile
        penalties = (edits.repetition_penalty, edits.presence_penalty, edits.frequency_penalty)
        words[at.penalties : at.numbers] = np.array(penalties, np.float32).view(np.int32)
        words[at.numbers : at.biased] = edits.num_prompt, edits.min_len, len(edits.biases), len(edits.bad_words)
        words[at.biased : at.biased + len(edits.biases)] = [token for token, _ in edits.biases]
        values = np.array([bias for _, bias in edits.biases], np.float32)
        words[at.biases : at.biases + len(edits.biases)] = values.view(np.int32)
        bad_words = words[at.bad_words : at.allowed].reshape(-1, MAX_BAD_WORD_TOKENS)
        bad_words[:] = NO_TOKEN
        for row, bad_word in zip(bad_words, edits.bad_words, strict=False):
            row[-len(bad_word) :] = bad_word
        words[at.allowed : at.stops] = -1 if edits.allowed is None else mask_words(edits.allowed, self.vocab_size)
        words[at.stops : at.size] = mask_words(edits.stop_token_ids, self.vocab_size)
        return words

    def _zeros(self, num_columns: int) -> Tensor:
        return torch.zeros(len(self.is_edited_S), num_columns, dtype=torch.int32, device=self.device)


def mask_words(tokens: tuple[int, ...], vocab_size: int) -> Ints:
    """A mask whose bits are these tokens: bit i of word w is token 32 w + i.

    >>> mask_words((0, 33), 64).tolist()
    [1, 2]
    """
    bits = np.zeros(-(-vocab_size // 32) * 32, bool)
    bits[list(tokens)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)
