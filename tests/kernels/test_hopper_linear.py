"""Products of up to 64 rows, weights first: which are taken, and what the norm adds. On a Hopper GPU: that they
are as exact as the oracle, and the same as one after the other (`-m gpu`)."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from minillm.kernels import gpu, hopper_linear, reference
from minillm.kernels.hopper_linear import Tile, choose_tile
from tests.kernels.test_skinny import check_as_near, operands

HALF = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
MAX_SHARED_BYTES = 227 * 1024
LAYER = {"qkv": (1024, 4096, {}), "out": (2048, 1024, {"is_shared": True})}
LAYER |= {"gate_up": (1024, 3072, {"is_gated": True}), "down": (3072, 1024, {"is_shared": True})}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("num_parts", "size"), [(1, 64), (3, 576), (8, 1000)])
def test_the_norm_adds_parts(device, poisoned, num_parts, size, dtype) -> None:
    parts_STD = torch.randn(num_parts, 5, size, device=device)
    residual_TD, weight_D = (torch.randn(*shape).to(device, dtype) for shape in ((5, size), (size,)))
    sums_TD = residual_TD.double() + parts_STD.double().sum(0)
    y_TD = gpu.add_rms_norm(parts_STD, residual_TD, weight_D, 1e-3)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(residual_TD.double(), sums_TD, rtol=unit, atol=8 * torch.finfo(torch.float32).eps)
    exact_TD = reference.rms_norm(residual_TD.double(), weight_D.double(), 1e-3)
    torch.testing.assert_close(y_TD.double(), exact_TD, rtol=4 * unit, atol=1e-6)
    assert y_TD.dtype == dtype


def shared_bytes(num_in: int, tile: Tile, is_gated: bool = False, is_shared: bool = False) -> int:
    """Of a program: its weights, and its ring of rows."""
    tile_bytes, num_tiles = 2 * tile.inputs, -(-num_in // (tile.parts * tile.inputs))
    return num_tiles * (1 + is_gated) * tile.outputs * tile_bytes + min(tile.depth, num_tiles) * 64 * tile_bytes


@pytest.mark.parametrize("product", LAYER)
def test_products_of_the_measured_model_are_streamed_and_fit(product) -> None:
    num_in, num_out, kind = LAYER[product]
    tile = choose_tile(num_in, num_out, **kind)
    assert tile is not None and shared_bytes(num_in, tile, **kind) <= MAX_SHARED_BYTES
    assert tile.parts == 1 or "is_shared" in kind
    assert choose_tile(2 * num_in, num_out, **kind) is None
    assert choose_tile(num_in, 2 * num_out, **kind) is None
    assert choose_tile(num_in - 4, num_out, **kind) is None
    assert choose_tile(num_in, 256, **kind) is None


def test_the_path_that_products_take(device, monkeypatch) -> None:
    """Few tokens, half precision, a tested GPU, and no head: else cuBLAS."""
    taken = []

    def record(x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, y: Tensor, tile: Tile, is_gated: bool) -> Tensor:
        taken.append((x_TD.shape[0], y.shape, is_gated))
        return y

    monkeypatch.setattr(hopper_linear, "launch", record)
    is_hopper = []
    monkeypatch.setattr(gpu, "has_hopper_kernel", lambda device: bool(is_hopper))
    monkeypatch.setattr(gpu, "suits_hopper_gated", lambda x_TD, num_out: False)

    def run(num_tokens: int, num_out: int = 4096, dtype: torch.dtype = torch.float16) -> list[tuple[int, ...]]:
        taken.clear()
        x_TD, weight_OD = torch.ones(num_tokens, 1024, dtype=dtype), torch.zeros(num_out, 1024, dtype=dtype)
        residual_TO = torch.zeros(num_tokens, num_out, dtype=dtype, device=device)
        for product in (gpu.linear, gpu.gated_linear, partial(gpu.linear_into, residual_TO)):
            product(x_TD.to(device), weight_OD.to(device), None)
        return taken

    assert not run(2)
    is_hopper.append(True)
    assert not run(65) and not run(2, dtype=torch.float32) and not run(1, 50_000)
    assert run(64, 3072) == [(64, (64, 3072), False), (64, (64, 1536), True), (64, (64, 3072), False)]
    assert run(1, 1024) == [(1, (4, 1, 1024), False)]


def products(draw: list[Tensor], tile: Tile) -> list[Tensor]:
    """Ours of all three kinds, the gated one of an even number of outputs: plain, gated, and parts added up."""
    x_TD, _, weight_OD, bias_O, _ = draw
    half = len(weight_OD) // 2
    bias_2F = None if bias_O is None else bias_O[: 2 * half]
    return [
        hopper_linear.linear(x_TD, weight_OD, bias_O, tile._replace(parts=1)),
        hopper_linear.gated_linear(x_TD, weight_OD[: 2 * half], bias_2F, tile._replace(parts=1)),
        hopper_linear.linear_parts(x_TD, weight_OD, bias_O, tile).sum(0).to(x_TD.dtype),
    ]


def expected(draw: list[Tensor]) -> list[Tensor]:
    """The oracle's, in the dtype of what is given."""
    x_TD, _, weight_OD, bias_O, _ = draw
    y_TO = reference.linear(x_TD, weight_OD, bias_O)
    return [y_TO, reference.silu_mul(y_TO[:, : y_TO.shape[1] // 2 * 2]), y_TO]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 9, 64, 100])
@pytest.mark.parametrize(
    ("num_in", "num_out", "tile"),
    [
        (1024, 128, Tile(32, 2, 128, 4)),
        (1024, 128, Tile(16, 4, 128, 2)),
        (1000, 202, Tile(32, 8, 128, 1)),
        (600, 72, Tile(64, 3, 64, 2)),
        (256, 300, Tile(128, 2, 128, 2)),
    ],
)
def test_products(device, poisoned, hopper, num_in, num_out, tile, num_tokens, dtype) -> None:
    num_draws = -(-250 // (num_tokens * num_out))
    draws = [operands(num_tokens, num_in, num_out, dtype, device) for _ in range(num_draws)]
    for has_bias in (False, True):
        given = [[t if i != 3 or has_bias else None for i, t in enumerate(draw)] for draw in draws]
        ours, twins, exact = (
            [torch.cat(parts) for parts in zip(*many, strict=True)]
            for many in (
                [products(draw, tile) for draw in given],
                [expected(draw) for draw in given],
                [expected([None if t is None else t.double() for t in draw]) for draw in given],
            )
        )
        for triple in zip(ours, twins, exact, strict=True):
            check_as_near(*triple)


@pytest.mark.gpu
def test_a_row_does_not_depend_on_the_others(device, hopper) -> None:
    draw = operands(64, 1024, 256, torch.bfloat16, device)
    everything = products(draw, Tile(32, 4, 128, 2))
    for rows in ([3, 6], [63, 0, 31, 5, 1, 17, 40, 22, 9]):
        few = products([draw[0][rows], *draw[1:]], Tile(32, 4, 128, 2))
        for ours, all_TO in zip(few, everything, strict=True):
            assert torch.equal(ours, all_TO[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [9, 64])
def test_overlapping_launches_never_race(device, hopper, monkeypatch, num_rows) -> None:
    """Many layers in one graph, replayed: always the bits that launches one after the other give."""
    layers = [
        [torch.randn(*size, device=device).div(size[1] ** 0.5).to(torch.bfloat16) for size in sizes]
        for sizes in [[(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)]] * 12
    ]
    norm_D = torch.rand(1024, device=device).add(0.5).to(torch.bfloat16)
    start_TD = torch.randn(num_rows, 1024, device=device).to(torch.bfloat16)
    residual_TD = start_TD.clone()

    def step() -> None:
        residual_TD.copy_(start_TD)
        x_TD = gpu.rms_norm(residual_TD, norm_D, 1e-6)
        for qkv, out, gate_up, down in layers:
            y_TD = gpu.linear_into(residual_TD, gpu.linear(x_TD, qkv)[:, 1024:3072].contiguous(), out, None)
            assert y_TD is not None and y_TD.ndim == 3, "cuBLAS was taken: the case tests nothing"
            x_TD = gpu.gated_linear(gpu.add_rms_norm(y_TD, residual_TD, norm_D, 1e-6), gate_up, None)
            y_TD = gpu.linear_into(residual_TD, x_TD, down, None)
            x_TD = gpu.add_rms_norm(y_TD, residual_TD, norm_D, 1e-6)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    monkeypatch.setattr(hopper_linear, "can_overlap", lambda device: False)
    step()
    expected_TD = residual_TD.clone()
    assert bool(expected_TD.isfinite().all())
    for _ in range(300):
        graph.replay()
        assert torch.equal(residual_TD, expected_TD)
