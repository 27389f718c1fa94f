"""What edited rows keep on the device, and their edited scores: penalties, biases, bans, masks. It knows no requests.

A row is edited if its seat's parameters say so; all others pay nothing. State follows positions alone, so nothing need
come to the host: a step writes its input tokens at their positions, and counts those up to its first sampled position,
which are certain by then. Drafts behind it are written as well and overwritten if they do not hold.

    history   | prompt, outputs counted ......... | input | draft | draft |
    position                                        start            samples at all three

Shapes: S seats, P words of a profile, V vocabulary, W = V / 32 words of a mask, N positions, L rows of logits,
K edited ones, M masks of grammars, C tokens to be counted, D drafts, B biases, Q bad words, U their tokens, n new
seats, T tokens.
"""

from __future__ import annotations

from functools import cached_property, partial
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minillm.core.plan import RowEdits, StepPlan
from minillm.runtime.batching import EditWords, column, places_of
from minillm.runtime.rows import Ints
from minillm.types import MAX_BAD_WORD_TOKENS, MAX_BIASED_TOKENS, MAX_TOKENIZED_BAD_WORDS

NO_TOKEN = -1
UNMATCHED = -2
"""In place of a token that no bad word may begin with."""
NUM_STEP_COLUMNS = 5
BAD_WORD_WORDS = MAX_TOKENIZED_BAD_WORDS * MAX_BAD_WORD_TOKENS


class Profile(NamedTuple):
    """Where a seat's words lie: each field is (begin, end)."""

    penalties: tuple[int, int]
    lengths: tuple[int, int]  # of the prompt, and of the sequence that may end
    biased: tuple[int, int]
    biases: tuple[int, int]
    bad_words: tuple[int, int]  # right-aligned, NO_TOKEN before them
    allowed: tuple[int, int]
    stops: tuple[int, int]

    @property
    def size(self) -> int:
        """Words in all."""
        return self.stops[1]


def profile_of(vocab_size: int) -> Profile:
    """The layout for a vocabulary."""
    mask = -(-vocab_size // 32)
    sizes = (3, 2, MAX_BIASED_TOKENS, MAX_BIASED_TOKENS, BAD_WORD_WORDS, mask, mask)
    ends = np.cumsum(sizes).tolist()
    return Profile(*zip([0, *ends], ends, strict=False))


class StepEdits(NamedTuple):
    """A step's edits, on the device."""

    words: EditWords
    sections: list[Tensor]
    mask_rows_K: Tensor | None = None
    masks_MW: Tensor | None = None  # None: no row of the step has a grammar

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """Row of logits, seat, position, the row's first sampled position and the token at the position, each [K]."""
        return self.sections[3].view(NUM_STEP_COLUMNS, -1).unbind()


class LogitEdits:
    """Edits by seat, all on the device but for what decides which of it is needed."""

    def __init__(self, num_seats: int, vocab_size: int, num_positions: int, device: torch.device) -> None:
        self.vocab_size, self.num_positions, self.device = vocab_size, num_positions, device
        self.profile = profile_of(vocab_size)
        # Host state: who is edited, how, and up to which position tokens are counted.
        self.is_edited_S = np.zeros(num_seats, bool)
        self.has_biases_S = np.zeros(num_seats, bool)
        self.has_bad_words_S = np.zeros(num_seats, bool)
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
        seated = [seat for seat in plan.seats if seat.params.edits is not None]
        for seat in plan.seats:
            edits = seat.params.edits
            self.is_edited_S[seat.row] = edits is not None
            self.has_biases_S[seat.row] = edits is not None and bool(edits.biases)
            self.has_bad_words_S[seat.row] = edits is not None and bool(edits.bad_words)
            self.has_grammar_S[seat.row] = edits is not None and edits.has_grammar
        if not self.is_edited_S.any():
            return None
        rows = column(plan.rows)[order]
        num_samples = column(plan.num_samples)[order] * self.is_edited_S[rows]
        if not seated and not num_samples.any():
            return None
        profiles, known = [], []
        for seat in seated:
            assert seat.params.edits is not None and seat.tokens is not None
            profiles.append(self._profile_words(seat.params.edits))
            tokens = column(seat.tokens)
            self.num_counted_S[seat.row] = len(tokens)
            is_output = np.arange(len(tokens)) >= seat.params.edits.num_prompt
            known.append(np.stack([np.full(len(tokens), seat.row), np.arange(len(tokens)), tokens, is_output]))
        flat = np.concatenate([np.zeros((4, 0)), *known], axis=1).astype(np.int32)
        flat = flat[:, np.argsort(flat[3], kind="stable")]  # prompts' tokens in front
        columns, counted = self._step_columns(plan, order, rows, num_samples)
        sampled = rows[num_samples > 0]
        mask_rows = self._mask_rows(plan, order, num_samples)
        return EditWords(
            sections=(
                np.array([seat.row for seat in seated], np.int32),
                np.concatenate([np.zeros(0, np.int32), *profiles]),
                flat[:3].reshape(-1),
                columns.reshape(-1),
                counted.reshape(-1),
            ),
            num_prompt=int((flat[3] == 0).sum()),
            num_rows=columns.shape[1],
            num_drafts=max(0, int(num_samples.max()) - 1),
            has_biases=bool(self.has_biases_S[sampled].any()),
            has_bad_words=bool(self.has_bad_words_S[sampled].any()),
            mask_rows=mask_rows,
            num_masks=int((mask_rows >= 0).sum()),
        )

    def seat(self, edits: StepEdits) -> None:
        """Apply the new seats' words."""
        seats, profiles, known = edits.sections[:3]
        num_prompt = edits.words.num_prompt
        if not seats.numel():
            return
        self.profiles_SP[seats] = profiles.view(-1, self.profile.size)
        known_seats, positions, tokens = known.view(3, -1).long()
        self.history_SN[known_seats, positions] = tokens.int()
        self.counts_SV.index_fill_(0, seats.long(), 0)  # to assign a number would wait for the device
        flat, places = self.counts_SV.view(-1), known_seats * self.vocab_size + tokens
        flat.index_add_(0, places[num_prompt:], torch.full_like(tokens[num_prompt:], 2, dtype=torch.int32))
        flat[places[:num_prompt]] |= 1

    def scores(self, ops: ModuleType, logits_LV: Tensor, last_tokens_S: Tensor, edits: StepEdits) -> Tensor:
        """Edited fp32 logits [K, V] of the step's edited rows; the step's input tokens are noted and counted."""
        words, sections = edits.words, edits.sections
        rows_K, seats_K, positions_K, starts_K, inputs_K = edits.columns
        inputs_K = torch.where(inputs_K == NO_TOKEN, last_tokens_S[seats_K], inputs_K)
        self.history_SN[seats_K, positions_K] = inputs_K
        counted_seats_C, counted_C = sections[4].view(2, -1)
        counted_tokens_C = self.history_SN[counted_seats_C, counted_C].long()
        places_C = counted_seats_C.long() * self.vocab_size + counted_tokens_C
        self.counts_SV.view(-1).index_add_(0, places_C, torch.full_like(counted_C, 2))

        scores_KV = logits_LV[rows_K].float()
        profiles_KP = self.profiles_SP[seats_K]
        if words.has_biases:
            biases_KB = self._part(profiles_KP, "biases").view(torch.float32)
            scores_KV.scatter_add_(1, self._part(profiles_KP, "biased").long(), biases_KB)
        lengths_K2 = self._part(profiles_KP, "lengths")
        if words.has_bad_words:
            self._ban(scores_KV, profiles_KP, seats_K, positions_K, lengths_K2[:, 0])
        may_stop_K1 = (positions_K + 1 >= lengths_K2[:, 1])[:, None]
        stops_KW = self._part(profiles_KP, "stops")
        mask_KW = self._part(profiles_KP, "allowed") & ~torch.where(may_stop_K1, 0, stops_KW)
        if edits.masks_MW is not None and edits.mask_rows_K is not None:
            own_KW = edits.masks_MW[edits.mask_rows_K.clamp(min=0)]
            mask_KW &= torch.where(edits.mask_rows_K[:, None] >= 0, own_KW, -1)
        ops.edit_scores(
            scores_KV,
            seats_K=seats_K,
            counts_SV=self.counts_SV,
            drafts_KD=self._drafts(seats_K, positions_K, starts_K, words.num_drafts),
            penalties_K3=self._part(profiles_KP, "penalties").view(torch.float32),
            mask_KW=mask_KW,
        )
        return scores_KV

    def padding_scores(self, ops: ModuleType, num_rows: int) -> Tensor:
        """What `scores` gives, of nothing: the same kernels, before there is an edited row."""
        make = partial(torch.zeros, dtype=torch.int32, device=self.device)
        scores_KV = torch.zeros(num_rows, self.vocab_size, device=self.device)
        ops.edit_scores(
            scores_KV,
            seats_K=make(num_rows),
            counts_SV=make(1, self.vocab_size),
            drafts_KD=make(num_rows, 0),
            penalties_K3=torch.ones(num_rows, 3, device=self.device),
            mask_KW=make(num_rows, -(-self.vocab_size // 32)),
        )
        return scores_KV

    def _step_columns(self, plan: StepPlan, order: Ints, rows: Ints, num_samples: Ints) -> tuple[Ints, Ints]:
        """Columns of the edited rows of logits [5, K], and (seat, position) of the tokens to be counted [2, C]."""
        num_logits = column(plan.num_samples)[order]
        starts = (column(plan.starts) + column(plan.counts))[order] - num_logits
        owners, within = places_of(num_samples)
        given = column(plan.num_tokens)
        token_ends = np.cumsum(given)[order]
        tokens = np.append(column(plan.tokens), NO_TOKEN).astype(np.int32)
        token_places = np.where(given[order][owners] > 0, token_ends[owners] - num_logits[owners] + within, -1)
        firsts = np.cumsum(num_logits) - num_logits
        columns = np.stack(
            [firsts[owners] + within, rows[owners], starts[owners] + within, starts[owners], tokens[token_places]]
        )
        num_counted = self.num_counted_S[rows]
        num_new = np.where(num_samples > 0, np.maximum(0, starts + 1 - num_counted), 0)
        counting, nth = places_of(num_new)
        self.num_counted_S[rows] = num_counted + num_new
        counted = np.stack([rows[counting], num_counted[counting] + nth])
        return columns.astype(np.int32), counted.astype(np.int32)

    def _mask_rows(self, plan: StepPlan, order: Ints, num_samples: Ints) -> Ints:
        """Per edited row of logits, its place among the masks, which come in the order of the plan."""
        is_masked = self.has_grammar_S[column(plan.rows)]
        num_masks = column(plan.num_samples) * is_masked
        firsts = (np.cumsum(num_masks) - num_masks)[order]
        owners, within = places_of(num_samples)
        return np.where(is_masked[order][owners], firsts[owners] + within, -1).astype(np.int32)

    def _profile_words(self, edits: RowEdits) -> Ints:
        """A seat's parameters as words."""
        words, at = np.zeros(self.profile.size, np.int32), self.profile
        penalties = (edits.repetition_penalty, edits.presence_penalty, edits.frequency_penalty)
        words[slice(*at.penalties)] = np.array(penalties, np.float32).view(np.int32)
        words[slice(*at.lengths)] = edits.num_prompt, edits.min_len
        num_biases = len(edits.biases)
        words[at.biased[0] : at.biased[0] + num_biases] = [token for token, _ in edits.biases]
        values = np.array([bias for _, bias in edits.biases], np.float32)
        words[at.biases[0] : at.biases[0] + num_biases] = values.view(np.int32)
        bad_words = words[slice(*at.bad_words)].reshape(-1, MAX_BAD_WORD_TOKENS)
        bad_words[:] = NO_TOKEN
        for row, bad_word in zip(bad_words, edits.bad_words, strict=False):
            row[-len(bad_word) :] = bad_word
        words[slice(*at.allowed)] = -1 if edits.allowed is None else mask_words(edits.allowed, self.vocab_size)
        words[slice(*at.stops)] = mask_words(edits.stop_token_ids, self.vocab_size)
        return words

    def _part(self, profiles_KP: Tensor, name: str) -> Tensor:
        """One field of the rows' profiles."""
        begin, end = getattr(self.profile, name)
        return profiles_KP[:, begin:end].contiguous()

    def _ban(
        self, scores_KV: Tensor, profiles_KP: Tensor, seats_K: Tensor, positions_K: Tensor, num_prompt_K: Tensor
    ) -> None:
        """Forbid the last token of each bad word whose other tokens are the output's latest."""
        words_KQU = self._part(profiles_KP, "bad_words").view(len(profiles_KP), -1, MAX_BAD_WORD_TOKENS)
        before = torch.arange(1 - MAX_BAD_WORD_TOKENS + 1, 1, device=self.device)
        places_KU = positions_K[:, None] + before
        latest_KU = self.history_SN[seats_K[:, None], places_KU.clamp(min=0)]
        latest_KU = torch.where(places_KU >= num_prompt_K[:, None], latest_KU, UNMATCHED)
        prefixes_KQU, lasts_KQ = words_KQU[:, :, :-1], words_KQU[:, :, -1]
        is_next_KQ = ((prefixes_KQU == NO_TOKEN) | (prefixes_KQU == latest_KU[:, None])).all(-1) & (lasts_KQ >= 0)
        bans_KQ = torch.zeros_like(lasts_KQ, dtype=torch.float32).masked_fill_(is_next_KQ, float("-inf"))
        scores_KV.scatter_add_(1, lasts_KQ.clamp(min=0).long(), bans_KQ)

    def _drafts(self, seats_K: Tensor, positions_K: Tensor, starts_K: Tensor, num_drafts: int) -> Tensor:
        """Drafts before each position [K, D], NO_TOKEN where there are fewer."""
        places_KD = starts_K[:, None] + torch.arange(1, num_drafts + 1, device=self.device)
        is_before_KD = places_KD <= positions_K[:, None]
        drafts_KD = self.history_SN[seats_K[:, None], torch.where(is_before_KD, places_KD, 0)]
        return torch.where(is_before_KD, drafts_KD, NO_TOKEN)

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
