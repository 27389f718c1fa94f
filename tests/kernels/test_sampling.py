"""Sampling: the kept sets are transformers', the noise is noise, and torch, the CPU set and Triton agree exactly.

Triton runs in its interpreter where there is no GPU.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from minillm.kernels import cpu, sampling
from minillm.kernels import sampling_reference as oracle

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def params(rows: list[dict[str, Any]], *, seed: int = 0, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Arguments of `sample` for rows given as {temperature, top_k, top_p, min_p}; seeds and positions are random."""
    draw = torch.Generator().manual_seed(seed)
    rows = [{"temperature": 1.0, **OFF, **row} for row in rows]
    floats = {
        f"{name}_L": torch.tensor([row[name] for row in rows]).float() for name in ("temperature", "top_p", "min_p")
    }
    made = {
        **floats,
        "top_k_L": torch.tensor([row["top_k"] for row in rows]).int(),
        "seeds_L": torch.randint(0, 2**63 - 1, (len(rows),), generator=draw),
        "positions_L": torch.randint(0, 100_000, (len(rows),), generator=draw).int(),
    }
    return {name: x.to(device) for name, x in made.items()}


def random_rows(num: int, vocab_size: int, seed: int) -> list[dict[str, Any]]:
    """Rows that mix greedy, plain and filtered sampling."""
    draw = torch.Generator().manual_seed(seed)

    def choose(*values: float) -> float:
        return values[int(torch.randint(len(values), (), generator=draw))]

    return [
        {
            "temperature": choose(0.0, 0.3, 0.7, 1.0, 1.3, 5.0),
            "top_k": int(choose(0, 0, 1, 5, 50, vocab_size - 1, vocab_size, vocab_size + 7)),
            "top_p": choose(1.0, 1.0, 0.999, 0.9, 0.5, 1e-3),
            "min_p": choose(0.0, 0.0, 0.01, 0.2, 1.0),
        }
        for _ in range(num)
    ]


def random_logits(
    num: int, vocab_size: int, seed: int, *, kind: str, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Flat, peaked or full of ties."""
    logits_LV = torch.randn(num, vocab_size, generator=torch.Generator().manual_seed(seed))
    scaled = {"flat": logits_LV * 0.05, "peaked": logits_LV * 4, "tied": (logits_LV * 3).round() / 2}[kind]
    return scaled.to(dtype)


def warped(scores_V: torch.Tensor, row: dict[str, Any]) -> torch.Tensor:
    """Which tokens transformers' chain of warpers keeps."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(row["temperature"])(None, scores_V[None])
    if row["top_k"]:
        scores = TopKLogitsWarper(row["top_k"])(None, scores)
    if row["top_p"] < 1.0:
        scores = TopPLogitsWarper(row["top_p"])(None, scores)
    if row["min_p"]:
        scores = MinPLogitsWarper(row["min_p"])(None, scores)
    return scores[0] > -math.inf


@pytest.mark.parametrize("kind", ["flat", "peaked", "tied"])
def test_kept_sets_equal_those_of_transformers_warpers(kind, monkeypatch) -> None:
    num, vocab_size = 400, 1000
    rows = [{**row, "temperature": row["temperature"] or 0.9} for row in random_rows(num, vocab_size, 7)]
    logits_LV = random_logits(num, vocab_size, 8, kind=kind)
    arguments = params(rows)
    scores_LV = oracle.scale_logits(logits_LV, arguments["temperature_L"])
    kept_LV = oracle.keep_mask(scores_LV, *(arguments[name] for name in ("top_k_L", "top_p_L", "min_p_L")))
    sort = torch.sort
    for logits_V, scores_V, row, kept_V in zip(logits_LV, scores_LV, rows, kept_LV, strict=True):
        # Which of equal tokens stay at top_p's edge is chance in transformers, whose sort is not stable ...
        as_is_V = warped(logits_V, row)
        assert sorted(scores_V[kept_V].tolist()) == sorted(scores_V[as_is_V].tolist()), row
        # ... and the same as here once it is.
        with monkeypatch.context() as patch:
            patch.setattr(torch, "sort", lambda x, descending=False: sort(x, descending=descending, stable=True))
            expected_V = warped(logits_V, row)
        assert torch.equal(kept_V, expected_V), row
        if row["top_k"] or row["top_p"] < 1 or row["min_p"]:
            ids_X = cpu.kept_tokens(scores_V, row["top_k"], row["top_p"], row["min_p"])
            assert torch.equal(ids_X, expected_V.nonzero().flatten()), row


def test_of_tied_tokens_top_p_keeps_the_highest_ids() -> None:
    scores_LV = torch.tensor([[3.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    probs = scores_LV[0].softmax(-1)
    top_p = probs[:1] + 1.5 * probs[1]  # the best and a tie and a half
    kept = oracle.keep_mask(scores_LV, torch.tensor([0]), top_p, torch.tensor([0.0]))
    assert kept.tolist() == [[True, False, False, True, True, False]]
    assert cpu.kept_tokens(scores_LV[0], 0, float(top_p), 0.0).tolist() == [0, 3, 4]


def test_noise_is_what_it_was() -> None:
    """Fixed numbers: a change of the noise changes every seeded answer."""
    first, second = oracle.row_keys(torch.tensor([0, 2**40 + 5]), torch.tensor([0, 17]))
    assert first.tolist() == [2488251732, 1056076016] and second.tolist() == [1066617606, 1843995264]
    noise = oracle.gumbel_noise(torch.tensor([2**40 + 5]), torch.tensor([17]), torch.tensor([0, 1, 151_935]))
    torch.testing.assert_close(noise[0], torch.tensor([0.55722815, 1.37642193, -0.68515241]))


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs.double() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("axis", ["positions", "seeds"])
@pytest.mark.parametrize("first_token", [0, 150_000])
def test_draws_follow_the_distribution(axis, first_token) -> None:
    num, vocab_size = 20_000, 50
    logits_V = torch.linspace(0, 4, vocab_size)
    counter = torch.arange(num)
    seeds, positions = (torch.full((num,), 12345), counter) if axis == "positions" else (counter, torch.full((num,), 7))
    noise_LV = oracle.gumbel_noise(seeds, positions, torch.arange(first_token, first_token + vocab_size))
    counts = torch.bincount((logits_V + noise_LV).argmax(-1), minlength=vocab_size)
    # 49 degrees of freedom: a fair draw exceeds 94.2 once in 10,000
    assert chi_square(counts, logits_V.softmax(-1)) < 94.2


def test_noise_is_uncorrelated_over_seeds_positions_and_tokens() -> None:
    """Correlations of 1,000,000 pairs have a standard deviation of 0.001."""
    n = 1000
    seeds, positions, ids = torch.arange(n) + 3, torch.arange(n) + 900, torch.arange(n)

    def normal(seeds, positions, ids) -> torch.Tensor:
        noise = oracle.gumbel_noise(seeds, positions, ids)
        return ((noise - noise.mean()) / noise.std()).flatten()

    one = torch.full((n,), 42)
    by_position, by_seed = normal(one, positions, ids), normal(seeds, one, ids)
    pairs = {
        "next position": (by_position, normal(one, positions + 1, ids)),
        "next seed": (by_seed, normal(seeds + 1, one, ids)),
        "high word of the seed": (by_seed, normal(seeds + (1 << 32), one, ids)),
        "seed and position swapped": (normal(seeds, one, ids), normal(one, seeds, ids)),
        "next token": (by_position, normal(one, positions, ids + 1)),
    }
    for name, (a, b) in pairs.items():
        assert abs(float((a * b).mean())) < 0.005, name
    uniform = torch.exp(-torch.exp(-oracle.gumbel_noise(one, positions, ids))).flatten()
    counts = torch.histc(uniform, bins=256, min=0, max=1)
    assert chi_square(counts, torch.full((256,), 1 / 256)) < 346  # 255 degrees of freedom, once in 10,000


SETS = {"cpu": cpu.sample, "triton": sampling.sample}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", ["flat", "peaked", "tied"])
@pytest.mark.parametrize(("vocab_size", "dtype"), [(1000, torch.float32), (4099, torch.bfloat16)])
def test_tokens_equal_the_oracle_exactly(name, vocab_size, kind, dtype, device) -> None:
    device = torch.device("cpu") if name == "cpu" else device
    rows = random_rows(12, vocab_size, vocab_size)
    logits_LV = random_logits(12, vocab_size, 3, kind=kind, dtype=dtype)
    arguments = params(rows, seed=5)
    for is_random, is_filtered in ((True, True), (True, False), (False, False)):
        switches = {"is_random": is_random, "is_filtered": is_filtered}
        expected_L, _ = oracle.sample(logits_LV, **arguments, **switches)
        on_device = {key: x.to(device) for key, x in arguments.items()}
        tokens_L, is_finite_L = SETS[name](logits_LV.to(device), **on_device, **switches)
        assert tokens_L.dtype == torch.int32 and tokens_L.tolist() == expected_L.tolist(), switches
        assert is_finite_L.dtype == torch.bool and is_finite_L.all()


@pytest.mark.parametrize("sample", [oracle.sample, *SETS.values()])
def test_a_row_depends_on_its_own_logits_seed_and_position(sample, device) -> None:
    device = torch.device("cpu") if sample is not sampling.sample else device
    logits_LV = random_logits(1, 300, 1, kind="flat").expand(6, -1)
    arguments = params([{"top_k": 200}] * 6)
    arguments["seeds_L"] = torch.tensor([5, 5, 6, 5, 5 + 2**32, 5])
    arguments["positions_L"] = torch.tensor([9, 9, 9, 10, 9, 9]).int()
    arguments["temperature_L"][5] = 1e-6
    tokens, _ = sample(logits_LV.to(device), **{name: x.to(device) for name, x in arguments.items()})
    tokens = tokens.tolist()
    assert tokens[0] == tokens[1]
    assert len({tokens[0], tokens[2], tokens[3], tokens[4]}) == 4
    assert tokens[5] == int(logits_LV[0].argmax())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("sample", [oracle.sample, *SETS.values()])
def test_rows_that_are_not_finite_are_flagged_and_the_others_unharmed(sample, device) -> None:
    device = torch.device("cpu") if sample is not sampling.sample else device
    logits_LV = random_logits(12, 5000, 2, kind="peaked")
    rows = [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.9}] * 3
    arguments = {name: x.to(device) for name, x in params(rows).items()}
    good_L, is_finite_L = sample(logits_LV.to(device), **arguments)
    assert is_finite_L.all()
    logits_LV[4:8, 4321] = torch.tensor([math.nan, math.inf, math.nan, math.inf])
    logits_LV[6, 17] = -math.inf
    logits_LV[7] = -math.inf
    logits_LV[8:, 77] = -math.inf  # a forbidden token is no failure
    tokens_L, is_finite_L = sample(logits_LV.to(device), **arguments)
    assert is_finite_L.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    assert tokens_L[4:8].tolist() == [0] * 4
    assert tokens_L[:4].tolist() == good_L[:4].tolist()


@pytest.mark.parametrize("sample", [oracle.sample, *SETS.values()])
def test_greedy_takes_the_lowest_of_equal_tokens(sample, device) -> None:
    device = torch.device("cpu") if sample is not sampling.sample else device
    logits_LV = torch.zeros(3, 9000)
    logits_LV[1, [8999, 4100, 4097]] = 2.0
    logits_LV[2] = -3.0
    arguments = {name: x.to(device) for name, x in params([{"temperature": 0.0}] * 3).items()}
    for switches in ({}, {"is_random": False, "is_filtered": False}):
        assert sample(logits_LV.to(device), **arguments, **switches)[0].tolist() == [0, 4097, 0]


@pytest.mark.parametrize("sample", [oracle.sample, *SETS.values()])
def test_no_rows_and_rows_of_a_wider_tensor(sample, device) -> None:
    device = torch.device("cpu") if sample is not sampling.sample else device
    wide_LV = random_logits(3, 700, 4, kind="peaked").to(device)
    arguments = {name: x.to(device) for name, x in params([{}, {"top_p": 0.5}, {"temperature": 0.0}]).items()}
    assert (
        sample(wide_LV[:, :600], **arguments)[0].tolist() == sample(wide_LV[:, :600].clone(), **arguments)[0].tolist()
    )
    if sample is not oracle.sample:
        empty = {name: x[:0] for name, x in arguments.items()}
        assert [x.shape for x in sample(wide_LV[:0], **empty)] == [(0,), (0,)]


@pytest.mark.parametrize("num_rows", [1, 7, 128, 300])
def test_tokens_are_kept_by_seat_and_failed_rows_marked(num_rows, device) -> None:
    draw = torch.Generator().manual_seed(num_rows)
    seats_L = torch.randperm(400, generator=draw)[:num_rows].int().to(device)
    tokens_L = torch.randint(1, 1000, (num_rows,), generator=draw).int().to(device)
    is_finite_L = (torch.rand(num_rows, generator=draw) < 0.7).to(device)
    kept, expected = (torch.full((400,), -7, dtype=torch.int32, device=device) for _ in range(2))
    samples_L = sampling.keep_tokens(tokens_L, is_finite_L, seats_L=seats_L, last_tokens_S=kept)
    expected_L = oracle.keep_tokens(tokens_L, is_finite_L, seats_L=seats_L, last_tokens_S=expected)
    assert samples_L.tolist() == expected_L.tolist() and kept.tolist() == expected.tolist()
    assert (kept != -7).sum() == num_rows and (samples_L == oracle.NOT_FINITE).sum() == (~is_finite_L).sum()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["flat", "peaked", "tied"])
def test_full_size_on_a_gpu_equals_the_oracle(dtype, kind) -> None:
    num, vocab_size = 256, 151_936
    logits_LV = random_logits(num, vocab_size, 1, kind=kind, dtype=dtype)
    for rows in ([{"top_k": 50, "top_p": 0.9}] * num, random_rows(num, vocab_size, 3), [{}] * num):
        arguments = params(rows, device="cuda")
        tokens_L, is_finite_L = sampling.sample(logits_LV.cuda(), **arguments)
        expected_L = [
            oracle.sample(logits_LV[i : i + 16].cuda(), **{name: x[i : i + 16] for name, x in arguments.items()})[0]
            for i in range(0, num, 16)
        ]
        assert is_finite_L.all()
        differing = (tokens_L != torch.cat(expected_L)).nonzero().flatten().tolist()
        assert not differing, [(i, rows[i]) for i in differing]


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_logits() -> None:
    rows = random_rows(16, 5000, 2)
    logits = [random_logits(16, 5000, seed, kind="peaked").cuda() for seed in (1, 2)]
    arguments, fixed_LV = params(rows, device="cuda"), logits[0].clone()
    sampling.sample(fixed_LV, **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens_L, _ = sampling.sample(fixed_LV, **arguments)
    for logits_LV in logits:
        fixed_LV.copy_(logits_LV)
        graph.replay()
        assert tokens_L.tolist() == oracle.sample(logits_LV, **arguments)[0].tolist()
