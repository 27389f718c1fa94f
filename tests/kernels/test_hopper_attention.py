"""Which attention kernel a Hopper GPU takes, and that its own is as exact as the plain one (`-m gpu`, Hopper only)."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import triton

from minillm.kernels import gpu
from tests.kernels.test_triton_attention import largest_error, oracle

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "version", "expected"),
    [((9, 0), "3.6.0", True), ((9, 0), "3.9.0", False), ((8, 0), "3.6.0", False), ((10, 0), "3.6.0", False)],
)
def test_only_tested_pairs_have_the_kernel(monkeypatch, capability, version, expected) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton, "__version__", version)
    assert gpu.has_hopper_kernel.__wrapped__(torch.device("cuda", 0)) is expected
    assert not gpu.has_hopper_kernel.__wrapped__(CPU)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({}, True),
        ({"dtype": torch.float16, "block_size": 128, "num_heads": 2}, True),
        ({"num_heads": 14}, True),
        ({"num_heads": 6}, False),
        ({"dtype": torch.float32}, False),
        ({"head_size": 96}, False),
        ({"block_size": 8}, False),
        ({"num_heads": 256}, False),
    ],
)
def test_shapes_that_suit_it(make_batch, shapes, expected) -> None:
    shapes = {"num_heads": 8, "head_size": 128, "dtype": torch.bfloat16, **shapes}
    q_TNH, inputs = make_batch([(2, 2)], **shapes, device=CPU)
    assert gpu.suits_hopper_kernel(q_TNH, inputs["kv_2BKPH"]) is expected


def test_the_path_that_attention_takes(make_batch, device, monkeypatch) -> None:
    """Chunks go to the Hopper kernel, unless the caller asks for something of the plain one; decodes never do."""
    taken = []

    def record(q_TNH, out_TNH, *, min_queries, **inputs) -> None:
        taken.append(min_queries)
        out_TNH[1:] = 7

    module = ModuleType("minillm.kernels.hopper_attention")
    module.hopper_attention = record
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(gpu, "has_hopper_kernel", lambda device: True)
    q_TNH, inputs = make_batch([(1, 20), (3, 20)], dtype=torch.float16, device=device)
    out_TNH = gpu.attention(q_TNH, **inputs)
    assert taken == [2]
    assert (out_TNH[1:] == 7).all()
    plain_TNH = gpu.attention(q_TNH, **inputs, block_tokens=64)
    gpu.attention(q_TNH, **inputs, one_launch=True)
    gpu.attention(q_TNH.float(), **{**inputs, "kv_2BKPH": inputs["kv_2BKPH"].float()})
    gpu.attention(q_TNH[:1].clone(), **{**inputs, "max_query_len": 1})
    assert taken == [2]
    assert torch.equal(out_TNH[0], plain_TNH[0])


def hopper_out(q_TNH, inputs, min_queries: int = 2, counts_T1=None):
    """The kernel's own output; what it leaves is NaN."""
    from minillm.kernels.hopper_attention import hopper_attention

    out_TNH = torch.full_like(q_TNH, torch.nan)
    names = ("kv_2BKPH", "block_tables_SM", "rows_R", "query_starts_R1", "context_lens_R", "scale")
    arguments = {name: inputs[name] for name in names}
    hopper_attention(q_TNH, out_TNH, min_queries=min_queries, counts_T1=counts_T1, **arguments)
    return out_TNH


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("group", "head_size", "block_size", "dtype"),
    [(4, 128, 16, torch.bfloat16), (2, 128, 64, torch.bfloat16), (1, 128, 128, torch.float16)]
    + [(3, 64, 32, torch.bfloat16), (7, 128, 16, torch.float16), (8, 64, 128, torch.bfloat16)],
)
def test_error_is_that_of_the_plain_kernel(make_batch, device, hopper, group, head_size, block_size, dtype) -> None:
    """Random lengths, stale slots that hold NaN, rows of one query between others."""
    draw = torch.Generator().manual_seed(group)
    counts = [2, 17, 128, 129, 300, *torch.randint(2, 700, (8,), generator=draw).tolist()]
    counts += [1] * 5
    rows = [
        (count, count + int(torch.randint(0, 2000, (), generator=draw)) * (i % 3)) for i, count in enumerate(counts)
    ]
    rows = [rows[i] for i in torch.randperm(len(rows), generator=draw).tolist()]
    q_TNH, inputs = make_batch(
        rows, num_heads=2 * group, head_size=head_size, block_size=block_size, dtype=dtype, device=device, seed=group
    )
    exact_TNH = oracle(q_TNH, inputs)
    starts = inputs["query_starts_R1"]
    is_decode_T = (starts.diff() == 1).repeat_interleave(starts.diff())
    plain = gpu.attention(q_TNH, **inputs, block_tokens=64, one_launch=True).double() - exact_TNH
    for min_queries in (1, 2):
        out_TNH = hopper_out(q_TNH, inputs, min_queries)
        if min_queries == 2:
            assert out_TNH[is_decode_T].isnan().all()
        own_T = ~is_decode_T | (min_queries == 1)
        ours, theirs = out_TNH[own_T].double() - exact_TNH[own_T], plain[own_T]
        assert float(ours.abs().nan_to_num(torch.inf).max() / theirs.abs().max()) <= 1.5
        assert float((ours.square().mean() / theirs.square().mean()).sqrt()) <= 1.05


@pytest.mark.gpu
def test_many_rows_on_a_hopper_gpu(make_batch, device, hopper) -> None:
    """More rows than are counted at once, most of them decodes, and more items than programs."""
    rows = [(1, 50)] * 150 + [(3, 40)] * 130 + [(40, 1000)] * 3
    q_TNH, inputs = make_batch(rows, num_heads=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16, device=device)
    error = largest_error(hopper_out(q_TNH, inputs)[150:], oracle(q_TNH, inputs)[150:])
    assert error <= 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [64, 128])
def test_chunks_equal_the_whole_prompt_on_a_hopper_gpu(make_batch, device, hopper, head_size) -> None:
    shapes = {"num_heads": 8, "head_size": head_size, "dtype": torch.bfloat16}
    q_TNH, inputs = make_batch([(700, 700)], **shapes, device=device)
    whole_TNH = hopper_out(q_TNH, inputs)
    for start, end in ((0, 2), (2, 130), (130, 389), (389, 700)):
        chunk = {
            "query_starts_R1": torch.tensor([0, end - start], dtype=torch.int32, device=device),
            "context_lens_R": torch.tensor([end], dtype=torch.int32, device=device),
        }
        assert torch.equal(hopper_out(q_TNH[start:end].clone(), {**inputs, **chunk}), whole_TNH[start:end])


@pytest.mark.parametrize(
    ("num_tiles", "max_keys", "expected"),
    [(64, 1 << 15, 2), (64, 2048, 1), (8, 1 << 17, 16), (96, 1 << 15, 4), (128, 1 << 15, 1), (264, 1 << 17, 1)],
)
def test_keys_are_cut_where_tiles_leave_programs_idle(num_tiles, max_keys, expected) -> None:
    from minillm.kernels.hopper_results import choose_shares

    assert choose_shares(num_tiles, 132, max_keys) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 4, 7])
def test_error_where_few_queries_see_many_keys(make_batch, device, hopper, group) -> None:
    """Rows whose keys are cut into segments, some behind what the first queries see, beside rows that are whole."""
    rows = [(1, 3000), (2, 1030), (7, 40), (40, 20_011), (500, 4200), (3, 9000), (129, 1024), (1, 1), (5, 2049)]
    shapes = {"num_heads": 2 * group, "head_size": 128, "dtype": torch.bfloat16}
    q_TNH, inputs = make_batch(rows, **shapes, device=device, seed=group)
    out_TNH, exact_TNH = hopper_out(q_TNH, inputs), oracle(q_TNH, inputs)
    plain_TNH = gpu.attention(q_TNH, **inputs, block_tokens=64, one_launch=True)
    first = 0
    for count, _ in rows:
        own = slice(first, first + count)
        first += count
        if count == 1:
            assert out_TNH[own].isnan().all()
            continue
        ours, theirs = out_TNH[own].double() - exact_TNH[own], plain_TNH[own].double() - exact_TNH[own]
        assert float(ours.abs().nan_to_num(torch.inf).max() / theirs.abs().max()) <= 1.5
        assert float((ours.square().mean() / theirs.square().mean()).sqrt()) <= 1.05
    counts_T1 = torch.zeros(len(q_TNH) + 1, dtype=torch.int32, device=device)
    for _ in range(3):  # layers that count in the same place
        assert torch.equal(hopper_out(q_TNH, inputs, counts_T1=counts_T1).nan_to_num(), out_TNH.nan_to_num())


@pytest.mark.gpu
def test_no_item_at_all(make_batch, device, hopper) -> None:
    q_TNH, inputs = make_batch([(1, 20), (1, 300)], num_heads=8, head_size=128, dtype=torch.bfloat16, device=device)
    counts_T1 = torch.zeros(len(q_TNH) + 1, dtype=torch.int32, device=device)
    assert hopper_out(q_TNH, inputs, counts_T1=counts_T1).isnan().all()
    assert not counts_T1.any()
