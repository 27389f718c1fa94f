"""The gated product of many rows: which are taken. On a Hopper GPU: that it is as exact as its twin, an output a matter
of its token alone, and that it neither overtakes its neighbours nor is overtaken (`-m gpu`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minillm.kernels import gpu, hopper_gated, reference
from tests.kernels.test_skinny import check_as_near, operands

NUM_PROGRAMS = 132
SMALL, LARGE = 3072, 14336
"""Gated outputs of qwen3-0.6b and of llama-3.1-8b."""


@pytest.mark.parametrize(
    ("num_out", "taken", "left"),
    [
        (SMALL, (512, 640, 1024, 1280, 2048, 8192, 16384), (72, 128, 256, 384, 768, 896)),
        (LARGE, (120, 128, 224, 256, 384, 512, 640, 768, 896, 1152, 8192, 16384), (72, 96, 136, 192, 320)),
    ],
)
def test_what_was_measured_to_be_faster_is_taken(num_out, taken, left) -> None:
    assert [num for num in (*taken, *left) if hopper_gated.is_faster(num, num_out, NUM_PROGRAMS)] == list(taken)


@pytest.mark.parametrize(
    ("token_tiles", "num_out", "expected"),
    [
        (1, LARGE, (112, 0)),
        (2, LARGE, (66, 96)),
        (4, LARGE, (99, 64)),
        (6, LARGE, (110, 32)),
        (8, LARGE, (112, 0)),
        (64, LARGE, (111, 64)),
        (2, SMALL, (0, 64)),
        (64, SMALL, (24, 0)),
        (1, 8, (0, 32)),
    ],
)
def test_the_last_round_is_narrow_where_that_is_enough(token_tiles, num_out, expected) -> None:
    assert hopper_gated.choose_widths(token_tiles, num_out, NUM_PROGRAMS) == expected


@pytest.mark.parametrize("num_programs", [20, NUM_PROGRAMS])
def test_every_output_is_in_one_tile_of_a_program(num_programs) -> None:
    """Full rounds but for the last, whose tiles are narrow; no program has two of those."""
    found = set()
    for num_out in (8, 96, 520, 3072, 9728, 14336):
        for token_tiles in (*range(1, 12), 64):
            sizes = token_tiles, num_out, num_programs
            num_wide, width = hopper_gated.choose_widths(*sizes)
            rest = num_out - 128 * num_wide
            num_programs_used = hopper_gated.grid_size(*sizes)
            assert 1 <= num_programs_used <= num_programs
            if not width:
                assert -128 < rest <= 0
                continue
            found.add(width)
            assert rest > 0 and 0 < token_tiles * -(-rest // width) <= num_programs_used
            full_rounds = -(-token_tiles * -(-num_out // 128) // num_programs) - 1
            assert token_tiles * num_wide <= full_rounds * num_programs_used
    assert found == {32, 64, 96}


@pytest.mark.parametrize("width", [32, 64, 96])
def test_pieces_that_are_multiplied_together_lie_together(width) -> None:
    first = min(width, 64) // 32
    places = {
        (piece, is_up): int(hopper_gated.place_of(piece, is_up, width))
        for piece in range(width // 32)
        for is_up in (0, 1)
    }
    assert [places[piece, 0] for piece in range(first)] == list(range(first))
    assert [places[piece, 1] for piece in range(first)] == list(range(first, 2 * first))
    assert width < 96 or (places[2, 0], places[2, 1]) == (4, 5)


def test_the_path_that_products_take(device, monkeypatch) -> None:
    """Many rows in half precision without a bias, of whole 16 bytes, a tested GPU: else cuBLAS and a second kernel."""
    taken = []

    def record(x_TD: Tensor, weight_2FD: Tensor) -> Tensor:
        taken.append(len(x_TD))
        return x_TD

    monkeypatch.setattr(hopper_gated, "gated_linear", record)
    monkeypatch.setattr(hopper_gated, "is_faster", lambda num_tokens, num_out, num_programs: True)
    monkeypatch.setattr(gpu, "num_multiprocessors", lambda device: NUM_PROGRAMS)
    is_hopper = []
    monkeypatch.setattr(gpu, "has_hopper_kernel", lambda device: bool(is_hopper))

    def is_taken(
        num_tokens: int, num_in: int = 16, num_out: int = 16, dtype: torch.dtype = torch.float16, has_bias: bool = False
    ) -> bool:
        taken.clear()
        x_TD, weight_2FD = torch.ones(num_tokens, num_in, dtype=dtype), torch.zeros(2 * num_out, num_in, dtype=dtype)
        gpu.gated_linear(x_TD.to(device), weight_2FD.to(device), weight_2FD[:, 0].to(device) if has_bias else None)
        return bool(taken)

    assert not is_taken(100)
    is_hopper.append(True)
    assert is_taken(100) and is_taken(65, 8, 8)
    assert not is_taken(64) and not is_taken(100, has_bias=True) and not is_taken(100, dtype=torch.float32)
    assert not is_taken(100, num_in=12) and not is_taken(100, num_out=12)
    monkeypatch.setattr(hopper_gated, "is_faster", lambda num_tokens, num_out, num_programs: False)
    assert not is_taken(100)


def twin(x_TD: Tensor, weight_2FD: Tensor) -> Tensor:
    """What one kernel does, by two functions of the oracle."""
    return reference.silu_mul(reference.linear(x_TD, weight_2FD, None))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "num_in", "num_out"),
    [
        (1, 8, 8),
        (65, 1000, 200),
        (128, 64, 128),
        (300, 1024, 3072),
        (1153, 264, 1000),
        (2500, 512, 2048),
        (3000, 4096, 520),
        (250, 64, 14336),
        (700, 64, 14336),
    ],
)
def test_products(device, poisoned, hopper, num_tokens, num_in, num_out, dtype) -> None:
    """Tails of tokens, inputs and outputs; fewer tiles than programs, and several rounds, the last one of any width."""
    num_draws = -(-250 // (num_tokens * num_out))
    draws = [operands(num_tokens, num_in, 2 * num_out, dtype, device) for _ in range(num_draws)]
    pairs = [(x_TD, weight_2FD) for x_TD, _, weight_2FD, _, _ in draws]
    ours = torch.cat([hopper_gated.gated_linear(*pair) for pair in pairs])
    twins = torch.cat([twin(*pair) for pair in pairs])
    exact = torch.cat([twin(x_TD.double(), weight_2FD.double()) for x_TD, weight_2FD in pairs])
    assert ours.shape == twins.shape
    check_as_near(ours, twins, exact)


@pytest.mark.gpu
def test_gates_far_from_zero(device, hopper) -> None:
    """Where the exponential overflows, below, and where it is nothing beside 1, above."""
    x_TD = torch.full((70, 64), 1.0, device=device, dtype=torch.bfloat16)
    weight_2FD = torch.ones(2 * 128, 64, device=device, dtype=torch.bfloat16)
    weight_2FD[:128] = torch.linspace(-8, 8, 128, device=device)[:, None]  # gates from -512 to 512, ups of 64
    y_TF = hopper_gated.gated_linear(x_TD, weight_2FD)
    exact_TF = twin(x_TD.double(), weight_2FD.double())
    torch.testing.assert_close(y_TF.double(), exact_TF, rtol=2**-8, atol=1e-30)


@pytest.mark.gpu
def test_a_row_does_not_depend_on_the_others(device, hopper) -> None:
    x_TD, _, weight_2FD, _, _ = operands(1500, 1024, 2 * 3072, torch.bfloat16, device)
    everything_TF = hopper_gated.gated_linear(x_TD, weight_2FD)
    for rows in ([3, 6], list(range(1499, 1199, -1)), list(range(0, 1500, 2))):
        assert torch.equal(hopper_gated.gated_linear(x_TD[rows], weight_2FD), everything_TF[rows])


@pytest.mark.gpu
def test_launches_side_by_side_never_race(device, hopper) -> None:
    """Among norms and products that follow each other, in one graph, replayed: always the bits of the first pass."""
    x_TD, norm_D, weight_2FD, _, _ = operands(1280, 1024, 2 * 3072, torch.bfloat16, device)
    down_DF = torch.randn(1024, 3072, device=device).div(3072**0.5).to(torch.bfloat16)
    start_TD = x_TD.clone()

    def step() -> None:
        x_TD.copy_(start_TD)
        y_TD = gpu.rms_norm(x_TD, norm_D, 1e-6)
        for _ in range(8):
            y_TD = gpu.linear(hopper_gated.gated_linear(y_TD, weight_2FD), down_DF)
            y_TD = gpu.add_rms_norm(y_TD, x_TD, norm_D, 1e-6)

    step()
    expected_TD = x_TD.clone()
    assert bool(expected_TD.isfinite().all())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(100):
        graph.replay()
        assert torch.equal(x_TD, expected_TD)
