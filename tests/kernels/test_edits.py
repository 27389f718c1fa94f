"""Edits of logits: transformers' and OpenAI's formulas, what is counted, and Triton equals torch.

Triton runs in its interpreter where there is no GPU.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.kernels import edits
from minillm.kernels import edits_reference as oracle
from minillm.kernels.edits_reference import NO_TOKEN, Profile

NUM_BIASES, NUM_BAD_WORDS, BAD_WORD_LEN, NUM_POSITIONS = 5, 6, 4, 40


def profile_of(vocab_size: int) -> Profile:
    num_words = -(-vocab_size // 32)
    sizes = (0, 3, 4, NUM_BIASES, NUM_BIASES, NUM_BAD_WORDS * BAD_WORD_LEN, num_words, num_words)
    return Profile._make([*accumulate(sizes), BAD_WORD_LEN])


def bits(values: Tensor) -> Tensor:
    return values.float().view(torch.int32)


def seat_state(num_seats: int, vocab_size: int, draw: torch.Generator) -> dict[str, Any]:
    """Random seats: most tokens new, some in the prompt, some in the output, some in both; few tokens in the history,
    of which bad words are made, so that some match."""
    at = profile_of(vocab_size)
    is_new = torch.rand(num_seats, vocab_size, generator=draw) < 0.7
    counts_SV = torch.randint(0, 6, (num_seats, vocab_size), generator=draw)
    profiles_SP = torch.zeros(num_seats, at.size, dtype=torch.int32)
    profiles_SP[:, at.penalties : at.numbers] = bits(torch.rand(num_seats, 3, generator=draw) * 2 + 0.1)
    limits = torch.tensor([[12, 30, NUM_BIASES + 1, NUM_BAD_WORDS + 1]])
    numbers_S4 = torch.rand(num_seats, 4, generator=draw) * limits
    profiles_SP[:, at.numbers : at.biased] = numbers_S4.int()
    for seat, (_, _, num_biases, num_bad_words) in enumerate(numbers_S4.int().tolist()):
        profiles_SP[seat, at.biased : at.biased + num_biases] = torch.randperm(vocab_size, generator=draw)[
            :num_biases
        ].int()
        profiles_SP[seat, at.biases : at.biases + num_biases] = bits(torch.randn(num_biases, generator=draw))
        words_QU = profiles_SP[seat, at.bad_words : at.allowed].view(NUM_BAD_WORDS, BAD_WORD_LEN)
        words_QU[:] = NO_TOKEN
        for word, length in enumerate([1, 2, 2, 2, 3, 4][:num_bad_words]):
            words_QU[word, -length:] = torch.randint(0, 3, (length,), generator=draw).int()
    for begin, end in ((at.allowed, at.stops), (at.stops, at.size)):
        # Few tokens are forbidden: else nothing of what else is done would be seen.
        masks = torch.randint(-(2**31), 2**31 - 1, (3, num_seats, end - begin), generator=draw)
        profiles_SP[:, begin:end] = (masks[0] | masks[1] | masks[2]).int()
    profiles_SP[:, at.stops :] = ~profiles_SP[:, at.stops :]
    return {
        "profiles_SP": profiles_SP,
        "counts_SV": torch.where(is_new, 0, counts_SV).int(),
        "history_SN": torch.randint(0, 3, (num_seats, NUM_POSITIONS), generator=draw).int(),
    }


def step_columns(num: int, num_drafts: int, num_masks: int, draw: torch.Generator) -> Tensor:
    """`num` rows of logits, of seats that have up to `num_drafts` drafts each."""
    rows = torch.randperm(num + 2, generator=draw).tolist()
    columns: list[list[int]] = []
    seat = 0
    while len(columns) < num:
        seat += 1
        first = int(torch.randint(6, NUM_POSITIONS - num_drafts, (1,), generator=draw))
        counted = first - int(torch.randint(0, 4, (1,), generator=draw))
        for draft in range(min(1 + seat % (num_drafts + 1), num - len(columns))):
            token = NO_TOKEN if draft == 0 and seat % 2 else (7 * len(columns)) % 3
            mask = int(torch.randint(-1, num_masks, (1,), generator=draw)) if num_masks else -1
            columns.append([rows[len(columns)], seat, first + draft, first, token, counted, mask])
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


def step_of(num: int, vocab_size: int, num_drafts: int, num_masks: int = 3) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits, columns, and the seats' state with the grammars' masks."""
    draw = torch.Generator().manual_seed(num + vocab_size)
    logits_LV = torch.randn(num + 2, vocab_size, generator=draw) * 8
    logits_LV[:, 1] = float("-inf")
    state = seat_state(num + 3, vocab_size, draw)
    masks = torch.randint(-(2**31), 2**31 - 1, (2, num_masks, -(-vocab_size // 32)), generator=draw)
    state["masks_MW"] = (masks[0] | masks[1]).int() if num_masks else None
    return logits_LV, step_columns(num, num_drafts, num_masks, draw), state


def plain_seat(vocab_size: int, **words: list[Any]) -> dict[str, Any]:
    """One seat without edits but those given, as words of its profile."""
    at = profile_of(vocab_size)
    profiles_SP = torch.zeros(2, at.size, dtype=torch.int32)
    profiles_SP[1, at.penalties : at.numbers] = bits(torch.tensor([1.0, 0.0, 0.0]))
    profiles_SP[1, at.allowed : at.stops] = -1
    for name, values in words.items():
        begin = getattr(at, name)
        tensor = torch.tensor(values)
        profiles_SP[1, begin : begin + len(values)] = bits(tensor) if tensor.is_floating_point() else tensor.int()
    return {
        "profiles_SP": profiles_SP,
        "profile": at,
        "counts_SV": torch.zeros(2, vocab_size, dtype=torch.int32),
        "history_SN": torch.zeros(2, NUM_POSITIONS, dtype=torch.int32),
    }


def column_of(position: int, first: int, token: int = NO_TOKEN, counted: int = 0) -> Tensor:
    return torch.tensor([[0, 1, position, first, token, counted, -1]], dtype=torch.int32).T.contiguous()


def test_formulas_equal_those_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    prompt, output, drafts = [3, 7, 7, 9], [7, 11, 11, 11], [12, 11]
    given = plain_seat(50, penalties=[1.3, 0.4, 0.25])
    given["counts_SV"][1, prompt] = 1
    for token in output:
        given["counts_SV"][1, token] += 2
    given["history_SN"][1, :10] = torch.tensor(prompt + output + drafts)
    logits_LV = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    scores_KV = oracle.edit_logits(logits_LV, column_of(10, 8), **given)
    seen = torch.tensor([prompt + output + drafts])
    expected_KV = RepetitionPenaltyLogitsProcessor(1.3)(seen, logits_LV.clone())
    for token in {*output, *drafts}:  # platform.openai.com, "Frequency and presence penalties"
        expected_KV[0, token] -= 0.4 + 0.25 * (output + drafts).count(token)
    torch.testing.assert_close(scores_KV, expected_KV)


def test_a_mask_leaves_out_what_its_bits_leave_out(device: torch.device) -> None:
    allowed = [0, 31, 32, 63, 69]
    words = [sum(1 << (t % 32) for t in allowed if t // 32 == w) for w in range(3)]
    signed = torch.tensor(words, dtype=torch.int64).to(torch.int32)

    def left(given: dict[str, Any], position: int = 9, **more: Any) -> list[int]:
        columns_7K = column_of(position, position)
        columns_7K[6] = 0 if more else -1
        found = [
            kernels.edit_logits(
                torch.zeros(1, 70, device=there),
                columns_7K.to(there),
                profile=given["profile"],
                **{name: x.to(there) for name, x in (given | more).items() if isinstance(x, Tensor)},
            )[0].isfinite()
            for kernels, there in ((oracle, torch.device("cpu")), (edits, device))
        ]
        assert torch.equal(found[0], found[1].cpu())
        return found[0].nonzero().flatten().tolist()

    assert left(plain_seat(70, allowed=signed.tolist())) == allowed
    assert left(plain_seat(70), masks_MW=signed[None]) == allowed
    stops = plain_seat(70, stops=signed.tolist(), numbers=[2, 9, 0, 0])
    assert left(stops) == list(range(70))
    assert left(stops, 8) == [token for token in range(70) if token not in allowed]


def test_tokens_are_counted_once_they_are_certain(device: torch.device) -> None:
    """A seat's last token and a draft: what came before the draft counts, and the draft only once it has held."""
    given = plain_seat(50)
    history_SN, counts_SV = given["history_SN"], given["counts_SV"]
    history_SN[1, :5] = torch.tensor([4, 5, 6, 6, 7])
    last_tokens_S = torch.tensor([0, 9], dtype=torch.int32)
    columns_7K = torch.cat([column_of(6, 6, counted=3), column_of(7, 6, token=8, counted=3)], dim=1)
    for kernels, there in ((oracle, torch.device("cpu")), (edits, device)):
        history, counts = history_SN.clone().to(there), counts_SV.clone().to(there)
        kernels.note_inputs(
            columns_7K.to(there), last_tokens_S=last_tokens_S.to(there), history_SN=history, counts_SV=counts
        )
        assert history[1, :8].tolist() == [4, 5, 6, 6, 7, 9, 8, 0]
        assert {token: count for token, count in enumerate(counts[1].tolist()) if count} == {6: 2, 7: 2, 9: 2}


@pytest.mark.parametrize(
    ("num", "vocab_size", "num_drafts", "num_masks"), [(1, 33, 0, 0), (4, 5000, 2, 3), (9, 4096, 5, 2)]
)
def test_triton_equals_torch(
    device: torch.device, poisoned: None, num: int, vocab_size: int, num_drafts: int, num_masks: int
) -> None:
    logits_LV, columns_7K, state = step_of(num, vocab_size, num_drafts, num_masks)
    last_tokens_S = torch.arange(num + 3, dtype=torch.int32) % 3
    ours = {name: None if x is None else x.clone().to(device) for name, x in state.items()}
    seats = [{name: each[name] for name in ("history_SN", "counts_SV")} for each in (state, ours)]
    before = {name: x.clone() for name, x in seats[0].items()}
    oracle.note_inputs(columns_7K, last_tokens_S=last_tokens_S, **seats[0])
    edits.note_inputs(columns_7K.to(device), last_tokens_S=last_tokens_S.to(device), **seats[1])
    for name, x in seats[0].items():
        assert torch.equal(seats[1][name].cpu(), x) and not torch.equal(before[name], x)

    profile = profile_of(vocab_size)
    expected_KV = oracle.edit_logits(logits_LV, columns_7K, profile=profile, **state)
    scores_KV = edits.edit_logits(logits_LV.to(device), columns_7K.to(device), profile=profile, **ours)
    assert torch.equal(scores_KV.cpu(), expected_KV)
    num_finite = int(expected_KV.isfinite().sum())
    assert 0 < num_finite < expected_KV.numel() and not torch.equal(expected_KV, logits_LV[columns_7K[0]])


@pytest.mark.parametrize("name", ["biased", "bad_words", "penalties", "allowed", "stops"])
def test_each_edit_is_seen_in_both(device: torch.device, name: str) -> None:
    """What a field says changes the scores of random seats: the comparison above is of all of them."""
    logits_LV, columns_7K, state = step_of(9, 4096, 5)
    at = profile_of(4096)
    scores_2KV = []
    for is_plain in (False, True):
        profiles_SP = state["profiles_SP"].clone()
        if is_plain and name in ("biased", "bad_words"):
            profiles_SP[:, at.numbers + (2 if name == "biased" else 3)] = 0
            profiles_SP[:, at.biases : at.bad_words] *= name != "biased"
        elif is_plain:
            plain = {"penalties": bits(torch.tensor([1.0, 0.0, 0.0])), "allowed": -1, "stops": 0}
            ends = {"penalties": at.numbers, "allowed": at.stops, "stops": at.size}
            profiles_SP[:, getattr(at, name) : ends[name]] = plain[name]
        given = {**state, "profiles_SP": profiles_SP}
        both = [
            kernels.edit_logits(
                logits_LV.to(there),
                columns_7K.to(there),
                profile=at,
                **{key: x.to(there) for key, x in given.items()},
            ).cpu()
            for kernels, there in ((oracle, torch.device("cpu")), (edits, device))
        ]
        assert torch.equal(*both)
        scores_2KV.append(both[0])
    assert not torch.equal(*scores_2KV)


def test_edited_samples_replace_those_of_their_rows(device: torch.device) -> None:
    columns_7K = step_of(4, 33, 0)[1]
    tokens_K = torch.tensor([5, 0, 7, 8], dtype=torch.int32)
    is_finite_K = torch.tensor([True, False, True, True])
    found = []
    for kernels, there in ((oracle, torch.device("cpu")), (edits, device)):
        samples_L, last_tokens_S = (torch.full((7,), 100, dtype=torch.int32, device=there) for _ in range(2))
        kernels.keep_edited(
            *(x.to(there) for x in (tokens_K, is_finite_K, columns_7K)),
            samples_L=samples_L,
            last_tokens_S=last_tokens_S,
        )
        found.append((samples_L.tolist(), last_tokens_S.tolist()))
    assert found[0] == found[1]
    rows, seats = columns_7K[0].tolist(), columns_7K[1].tolist()
    assert [found[0][0][row] for row in rows] == [5, -1, 7, 8]
    assert [found[0][1][seat] for seat in seats] == [5, 0, 7, 8]
    assert sorted(found[0][0])[-3:] == sorted(found[0][1])[-3:] == [100, 100, 100]


@pytest.mark.gpu
def test_full_size_on_a_gpu_equals_torch() -> None:
    logits_LV, columns_7K, state = step_of(256, 151_936, 3)
    given = {name: x.cuda() for name, x in state.items()} | {"profile": profile_of(151_936)}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = logits_LV.cuda().to(dtype), columns_7K.cuda()
        assert torch.equal(edits.edit_logits(*inputs, **given), oracle.edit_logits(*inputs, **given))
