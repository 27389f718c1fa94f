"""Fused products and attention of a few rows against the oracle, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.kernels import gpu, reference, skinny
from minillm.kernels.skinny import choose_shared_tile, choose_tile

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SHAPES = [(64, 48), (1000, 37), (300, 72)]
"""(inputs, outputs): whole tiles, ragged both, ragged inputs."""


def error(ours: Tensor, exact: Tensor) -> float:
    """Largest, over the sizes of the result and of a usual one; infinity where anything is NaN."""
    difference = (ours.double() - exact).abs().nan_to_num(torch.inf, torch.inf)
    return float((difference / (exact.abs() + exact.abs().mean())).max())


def check_as_near(ours: Tensor, twin: Tensor, exact: Tensor) -> None:
    """Rounded less often than the unfused twin in the same dtype, so no farther from the exact result; the last term is
    for float32 sums in another order. Of some 250 results the ratio's own spread is 0.06."""

    def rms(x: Tensor) -> float:
        return float(x.double().square().mean().sqrt())

    assert ours.dtype == twin.dtype and ours.shape == exact.shape
    assert rms(ours - exact) <= 1.3 * rms(twin - exact) + 2**-20 * rms(exact)


def operands(num_tokens: int, num_in: int, num_out: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x_TD, norm_D, weight_OD, bias_O, residual_TO."""
    drawn = [
        3 * torch.randn(num_tokens, num_in),
        torch.rand(num_in) + 0.5,
        torch.randn(num_out, num_in) / num_in**0.5,
        torch.randn(num_out),
        torch.randn(num_tokens, num_out),
    ]
    return [x.to(device, dtype) for x in drawn]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 8])
@pytest.mark.parametrize(("num_in", "num_out"), SHAPES)
def test_products(device, poisoned, monkeypatch, num_in, num_out, num_tokens, dtype) -> None:
    monkeypatch.setattr(skinny, "MANY_OUTPUTS", 40)  # so that programs have 8 outputs or 16
    num_draws = -(-250 // (num_tokens * num_out))
    draws = [operands(num_tokens, num_in, num_out, dtype, device) for _ in range(num_draws)]
    half = num_out // 2

    def normed_linear(x, norm, weight, bias, residual):
        return reference.linear(reference.rms_norm(x, norm, 1e-3), weight, bias)

    def gated(x, norm, weight, bias, residual):
        bias = bias if bias is None else bias[: 2 * half]
        return reference.silu_mul(normed_linear(x, norm, weight[: 2 * half], bias, residual))

    def added(x, norm, weight, bias, residual):
        return residual + reference.linear(x, weight, bias)

    def fused_linear(x, norm, weight, bias, residual):
        return gpu.norm_linear(x, norm, 1e-3, weight, bias)

    def fused_gated(x, norm, weight, bias, residual):
        bias = bias if bias is None else bias[: 2 * half]
        return gpu.norm_gated_linear(x, norm, 1e-3, weight[: 2 * half], bias)

    def fused_added(x, norm, weight, bias, residual):
        total = residual.clone()
        gpu.add_linear(total, x, weight, bias)
        return total

    for has_bias in (False, True):
        given = [[t if i != 3 or has_bias else None for i, t in enumerate(draw)] for draw in draws]
        exact = [[None if t is None else t.double() for t in draw] for draw in given]
        for ours, twin in ((fused_linear, normed_linear), (fused_gated, gated), (fused_added, added)):
            check_as_near(
                torch.cat([ours(*draw) for draw in given]),
                torch.cat([twin(*draw) for draw in given]),
                torch.cat([twin(*draw) for draw in exact]),
            )


def test_silu_of_large_values_is_finite(device) -> None:
    x_TD, weight_2FD = torch.ones(2, 16, device=device), torch.ones(2, 16, device=device)
    for sign in (-100.0, 100.0):
        weight_2FD[0] = sign
        y_TF = gpu.norm_gated_linear(x_TD, torch.ones(16, device=device), 1e-6, weight_2FD, None)
        exact = reference.silu_mul(reference.rms_norm(x_TD, torch.ones(16, device=device), 1e-6) @ weight_2FD.T)
        torch.testing.assert_close(y_TF, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_a_row_of_several_does_not_depend_on_the_others(device, dtype) -> None:
    x_TD, norm_D, weight_OD, _, residual_TO = operands(8, 96, 48, dtype, device)
    all_TO = gpu.norm_linear(x_TD, norm_D, 1e-6, weight_OD, None)
    sum_TO = residual_TO.clone()
    gpu.add_linear(sum_TO, x_TD, weight_OD, None)
    for rows in ([3, 6], [7, 0, 3, 5, 1]):
        assert torch.equal(gpu.norm_linear(x_TD[rows], norm_D, 1e-6, weight_OD, None), all_TO[rows])
        few_TO = residual_TO[rows]
        gpu.add_linear(few_TO, x_TD[rows], weight_OD, None)
        assert torch.equal(few_TO, sum_TO[rows])


def test_tiles_fit_the_registers() -> None:
    for num_in in (64, 576, 1024, 3072, 8192, 14336, 32768):
        for is_gated in (False, True):
            tile = choose_tile(num_in, is_gated)
            assert tile.outputs * num_in * (4 if is_gated else 2) <= 512 * 32 * tile.num_warps
    for num_in, num_out, is_gated in (
        (1024, 4096, True),
        (4096, 1024, False),
        (1024, 4096, False),
        (3072, 1024, False),
    ):
        tile = choose_shared_tile(num_in, num_out, is_gated)
        assert tile.outputs * num_in * (4 if is_gated else 2) <= 512 * 32 * tile.num_warps
        assert tile.inputs < 2 * num_in


def test_what_is_fused(device) -> None:
    def rows(hidden: int, inner: int, head_size: int = 128, dtype: torch.dtype = torch.bfloat16) -> int:
        sizes = {"hidden_size": hidden, "inner_sizes": (hidden, inner), "head_size": head_size}
        return gpu.max_fused_rows(**sizes, dtype=dtype, device=device)

    assert rows(1024, 3072) == rows(576, 1536, 64) == 8
    assert rows(4096, 14336) == rows(2048, 6144) == rows(1024, 4608) == 1
    assert rows(1024, 40_000) == rows(1024, 3072, head_size=320) == rows(1024, 3072, head_size=65) == 0
    assert rows(1024, 3072, dtype=torch.float32) == 0
    cpu = {"hidden_size": 64, "inner_sizes": (64,), "head_size": 64, "dtype": torch.float16}
    assert gpu.max_fused_rows(**cpu, device=torch.device("cpu")) == (0 if device.type == "cuda" else 8)


def decode_inputs(make_batch: Any, contexts: list[int], has_norm: bool, **shape: Any) -> dict[str, Any]:
    """Arguments of `rotary_and_store`, then of `attention`, for rows of one token; the new keys' slots hold NaN."""
    q_TNH, inputs = make_batch([(1, context) for context in contexts], **shape)
    num_tokens, num_heads, head_size = q_TNH.shape
    _, _, num_kv_heads, block_size, _ = inputs["kv_2BKPH"].shape
    device, dtype = q_TNH.device, q_TNH.dtype
    positions_T = inputs["context_lens_R"] - 1
    blocks_T = inputs["block_tables_SM"][inputs["rows_R"].long(), positions_T.long() // block_size].long()
    slots_T = blocks_T * block_size + positions_T % block_size
    inputs["kv_2BKPH"][:, blocks_T, :, positions_T.long() % block_size] = torch.nan
    random = torch.Generator().manual_seed(len(contexts))
    qkv_TC = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_size, generator=random)
    norms_2H = torch.rand(2, head_size, generator=random) + 0.5
    angles_Eh = torch.arange(max(contexts))[:, None] / 1000 ** (torch.arange(head_size // 2) / (head_size // 2))
    rotary = {
        "qkv_TC": qkv_TC.to(device, dtype),
        "cos_sin_EH": torch.cat((angles_Eh.cos(), angles_Eh.sin()), -1).to(device),
        "slots_T": slots_T,
        "q_norm_H": norms_2H[0].to(device, dtype) if has_norm else None,
        "k_norm_H": norms_2H[1].to(device, dtype) if has_norm else None,
        "eps": 1e-6,
        "num_heads": num_heads,
    }
    return {"rotary": rotary, "positions_T": positions_T, "attention": inputs}


def fused(given: dict[str, Any], kv_2BKPH: Tensor) -> Tensor:
    names = ("block_tables_SM", "rows_R", "context_lens_R", "scale", "max_context_len")
    rest = {name: given["attention"][name] for name in names}
    out_TNH: Tensor = gpu.fused_decode(**given["rotary"], **rest, kv_2BKPH=kv_2BKPH)
    return out_TNH


def unfused(given: dict[str, Any], kv_2BKPH: Tensor, kernels: Any = gpu) -> Tensor:
    rotary = {**given["rotary"], "positions_T": given["positions_T"], "num_kv_heads": kv_2BKPH.shape[2]}
    q_TNH = kernels.rotary_and_store(rotary.pop("qkv_TC"), **rotary, kv_2BKPH=kv_2BKPH)
    out_TNH: Tensor = kernels.attention(q_TNH, **{**given["attention"], "kv_2BKPH": kv_2BKPH})
    return out_TNH


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("has_norm", "num_heads", "num_kv_heads", "head_size", "block_size"),
    [
        (True, 4, 2, 64, 16),
        (False, 2, 1, 128, 64),
        (True, 7, 1, 24, 32),
        (False, 3, 3, 80, 16),
        (True, 8, 1, 96, 128),
    ],
)
def test_attention_of_the_product(
    make_batch, device, poisoned, has_norm, num_heads, num_kv_heads, head_size, block_size, dtype
) -> None:
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_size": head_size, "block_size": block_size}
    given = decode_inputs(make_batch, [1, 17, 129, 300, 65], has_norm, **shape, dtype=dtype, device=device)
    ours_2BKPH, theirs_2BKPH = (given["attention"]["kv_2BKPH"].clone() for _ in range(2))
    out_TNH, expected_TNH = fused(given, ours_2BKPH), unfused(given, theirs_2BKPH, reference)
    limit = TOLERANCE[dtype]
    assert error(out_TNH, expected_TNH.double()) <= limit
    torch.testing.assert_close(ours_2BKPH, theirs_2BKPH, rtol=limit, atol=4 * limit, equal_nan=True)
    assert torch.equal(ours_2BKPH[1].nan_to_num(7), theirs_2BKPH[1].nan_to_num(7))


def test_more_segments_than_the_most_and_rows_alone(make_batch, device, poisoned) -> None:
    shape = {"num_heads": 8, "num_kv_heads": 8, "head_size": 16}
    given = decode_inputs(make_batch, [2700, 5, 140], False, **shape, device=device)
    kv_2BKPH = given["attention"]["kv_2BKPH"]
    out_TNH = fused(given, kv_2BKPH)
    assert error(out_TNH, unfused(given, kv_2BKPH, reference).double()) <= TOLERANCE[torch.float32]
    for row in range(3):
        alone = {"rotary": dict(given["rotary"]), "attention": dict(given["attention"])}
        for part, name in (("rotary", "qkv_TC"), ("rotary", "slots_T"), ("attention", "rows_R")):
            alone[part][name] = given[part][name][row : row + 1]
        alone["attention"]["context_lens_R"] = given["attention"]["context_lens_R"][row : row + 1]
        alone["attention"]["max_context_len"] = 100_000
        assert torch.equal(fused(alone, kv_2BKPH)[0], out_TNH[row])


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_overlapping_launches_never_race(make_batch, device, monkeypatch, num_rows) -> None:
    """Many layers in one graph, replayed: always the bits that launches one after the other give, at any length.

    On two inputs by turns, so that what the last replay left is never right for this one.
    """
    from minillm.kernels import decode_attention, fused_decode

    shape = {"num_heads": 16, "num_kv_heads": 8, "head_size": 128, "dtype": torch.bfloat16, "device": device}
    given = decode_inputs(make_batch, [900 - 7 * i for i in range(num_rows)], True, **shape)
    layers = [
        [torch.randn(*size, device=device).div(size[1] ** 0.5).to(torch.bfloat16) for size in sizes]
        for sizes in [[(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)]] * 12
    ]
    norm_D = torch.rand(1024, device=device).add(0.5).to(torch.bfloat16)
    inputs_2TD = torch.randn(2, num_rows, 1024, device=device).to(torch.bfloat16)
    start_TD = inputs_2TD[0].clone()
    caches = [given["attention"]["kv_2BKPH"].clone() for _ in layers]
    residual_TD = start_TD.clone()
    lens_R, lengths_R = given["attention"]["context_lens_R"], given["attention"]["context_lens_R"].clone()

    def step() -> None:
        residual_TD.copy_(start_TD)
        for (qkv, out, gate_up, down), cache in zip(layers, caches, strict=True):
            given["rotary"]["qkv_TC"] = gpu.norm_linear(residual_TD, norm_D, 1e-6, qkv, None)
            gpu.add_linear(residual_TD, fused(given, cache).flatten(1), out, None)
            y_TF = gpu.norm_gated_linear(residual_TD, norm_D, 1e-6, gate_up, None)
            gpu.add_linear(residual_TD, y_TF, down, None)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for module in (decode_attention, fused_decode, skinny):
        monkeypatch.setattr(module, "can_overlap", lambda device: False)
    for shorter in (0, 500, 800):
        lens_R.copy_(lengths_R - shorter)  # the slots of the new keys stay: only reads move
        expected = []
        for input_TD in inputs_2TD:
            start_TD.copy_(input_TD)
            step()
            expected.append(residual_TD.clone())
            assert bool(expected[-1].isfinite().all())
        assert not torch.equal(*expected)
        for turn in range(100):
            start_TD.copy_(inputs_2TD[turn % 2])
            graph.replay()
            assert torch.equal(residual_TD, expected[turn % 2]), f"replay {turn}"
