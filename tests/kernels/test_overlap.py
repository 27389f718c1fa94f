"""Kernels that start before the one before them has ended leave the bits of launches one after the other (`-m gpu`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.kernels import decode_attention, gpu

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_SIZE = 1024, 3072, 16, 8, 128
NUM_LAYERS, NUM_REPLAYS = 6, 100
PRODUCTS = [
    ((HEADS + 2 * KV_HEADS) * HEAD_SIZE, HIDDEN),
    (HIDDEN, HEADS * HEAD_SIZE),
    (2 * INNER, HIDDEN),
    (HIDDEN, INNER),
]


def places(counts: list[int], inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Positions and slots of a batch's tokens."""
    block_size = inputs["kv_2BKPH"].shape[3]
    contexts, seats = inputs["context_lens_R"].tolist(), inputs["rows_R"].tolist()
    positions = [torch.arange(context - count, context) for count, context in zip(counts, contexts, strict=True)]
    tables_SM = inputs["block_tables_SM"].cpu().long()
    blocks = [tables_SM[seat][at // block_size] for seat, at in zip(seats, positions, strict=True)]
    positions_T = torch.cat(positions)
    slots_T = torch.cat(blocks) * block_size + positions_T % block_size
    device = inputs["rows_R"].device
    return positions_T.int().to(device), slots_T.to(device)


def shorter(rows: list[tuple[int, int]]) -> list[int]:
    """Other contexts of the rows: no row reads what it writes with its own, and other rows are the long ones."""
    spread = [(context - count) * (1 + 3 * i % 8) // 8 for i, (count, context) in enumerate(rows)]
    return [least if least >= count else context for least, (count, context) in zip(spread, rows, strict=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("num_empty", [0, 240], ids=["", "padded"])
@pytest.mark.parametrize(
    "rows",
    [
        [(1, 700 - 7 * i) for i in range(9)],  # few: rows are shared and merged
        [(1, 700 - 7 * i) for i in range(64)],
        [(1, 130 - i % 64) for i in range(200)],
        [*((1, 700 - 7 * i) for i in range(20)), (300, 400), (70, 70)],
        [(300, 400), (70, 70)],
        [(40, 400), (20, 20)],
    ],
    ids=["9 rows", "64 rows", "200 rows", "decodes and chunks", "chunks", "small chunks"],
)
def test_layers_never_race(make_batch, device, monkeypatch, rows, num_empty) -> None:
    """Layers in one graph on two inputs of other lengths by turns: what the last replay left is never right for this.

    Rows without tokens pad a step that is captured: with chunks alone, decode attention has nothing to do.
    """
    shape = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_size": HEAD_SIZE, "dtype": torch.bfloat16}
    q_TNH, inputs = make_batch(rows, **shape, device=device)
    counts = [count for count, _ in rows]
    long_R = inputs["context_lens_R"].clone()
    places_2 = [places(counts, inputs)]
    inputs["context_lens_R"].copy_(torch.tensor(shorter(rows)))
    lens_2R = [long_R, inputs["context_lens_R"].clone()]
    places_2.append(places(counts, inputs))
    positions_T, slots_T = (x_T.clone() for x_T in places_2[0])
    if num_empty:
        for name, last in (("rows_R", 0), ("context_lens_R", 0), ("query_starts_R1", sum(count for count, _ in rows))):
            inputs[name] = torch.cat((inputs[name], inputs[name].new_full((num_empty,), last)))
        inputs["num_decodes"] = len(rows) + num_empty
        inputs["max_query_len"] = max(2, inputs["max_query_len"])
    random = {"device": device, "dtype": torch.bfloat16}
    layers = [[torch.randn(*size, **random) / size[1] ** 0.5 for size in PRODUCTS] for _ in range(NUM_LAYERS)]
    norm_D, norm_H = torch.rand(HIDDEN, **random) + 0.5, torch.rand(HEAD_SIZE, **random) + 0.5
    angles_Eh = torch.arange(1024, device=device)[:, None] / 1000 ** (torch.arange(64, device=device) / 64)
    cos_sin_EH = torch.cat((angles_Eh.cos(), angles_Eh.sin()), -1)
    kv_2BKPH = inputs.pop("kv_2BKPH")
    caches = [kv_2BKPH.clone() for _ in layers]
    inputs_2TD = torch.randn(2, q_TNH.shape[0], HIDDEN, **random)
    start_TD = inputs_2TD[0].clone()

    def choose(turn: int) -> None:
        start_TD.copy_(inputs_2TD[turn])
        inputs["context_lens_R"][: len(rows)].copy_(lens_2R[turn])
        positions_T.copy_(places_2[turn][0])
        slots_T.copy_(places_2[turn][1])

    steers = ("block_tables_SM", "rows_R", "query_starts_R1", "context_lens_R", "num_decodes", "max_context_len")
    places_T = {"cos_sin_EH": cos_sin_EH, "positions_T": positions_T, "slots_T": slots_T}

    def step() -> Tensor:
        prepared = gpu.prepare_step(**places_T, kv_2BKPH=kv_2BKPH, **{name: inputs[name] for name in steers})
        residual_TD, x_TD = start_TD.clone(), start_TD
        for (qkv, out, gate_up, down), cache in zip(layers, caches, strict=True):
            x_TD = gpu.add_rms_norm(x_TD, residual_TD, norm_D, 1e-6)
            q_TNH = gpu.rotary_and_store(
                gpu.linear(x_TD, qkv), **places_T, kv_2BKPH=cache, q_norm_H=norm_H, k_norm_H=norm_H, eps=1e-6,
                num_heads=HEADS, num_kv_heads=KV_HEADS, prepared=prepared,
            )  # fmt: skip
            o_TNH = gpu.attention(q_TNH, kv_2BKPH=cache, **inputs, prepared=prepared)
            x_TD = gpu.linear(o_TNH.flatten(1), out)
            x_TD = gpu.add_rms_norm(x_TD, residual_TD, norm_D, 1e-6)
            x_TD = gpu.linear(gpu.silu_mul(gpu.linear(x_TD, gate_up)), down)
        return x_TD + residual_TD

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed_TD = step()
    monkeypatch.setattr(decode_attention, "can_overlap", lambda device: False)
    expected = []
    for turn in (0, 1, 0, 1):  # the longer contexts hold what the shorter ones wrote
        choose(turn)
        expected.append(step())
        assert bool(expected[-1].isfinite().all())
    expected = expected[2:]
    assert not torch.equal(*expected)
    for turn in range(NUM_REPLAYS):
        choose(turn % 2)
        graph.replay()
        assert torch.equal(replayed_TD, expected[turn % 2]), f"replay {turn}"
