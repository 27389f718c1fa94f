"""Paged Flash Attention and split-KV decoding against the float64 oracle, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import warnings
from math import ceil

import pytest
import torch

from minillm.kernels import gpu, reference
from minillm.kernels.attention import Tile, choose_tile, paired
from minillm.kernels.dealing import MAX_SORTED_ROWS, choose_shares, deal, max_segments
from minillm.kernels.decode_attention import decode_attention
from minillm.kernels.fused_decode import choose_programs

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3}
MIXED = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 40), (2, 2), (15, 15), (16, 16), (17, 17), (3, 35), (16, 48), (31, 33)]


def oracle(q_TNH, inputs):
    """The exact attention of these inputs, in float64."""
    return reference.attention(q_TNH.double(), **{**inputs, "kv_2BKPH": inputs["kv_2BKPH"].double()})


def dealt_attention(q_TNH, inputs, shares):
    """Decode attention of the rows dealt among `shares`, with NaN where it writes nothing; and what was dealt."""
    names = ("rows_R", "query_starts_R1", "context_lens_R", "num_decodes")
    rows = {name: inputs[name] for name in names}
    dealt = deal(inputs["kv_2BKPH"], **rows, num_tokens=len(q_TNH), shares=shares)
    out_TNH = torch.full_like(q_TNH, torch.nan)
    others = {name: inputs[name] for name in ("kv_2BKPH", "block_tables_SM", "context_lens_R", "scale")}
    decode_attention(q_TNH, out_TNH, dealt, **others)
    return out_TNH, dealt


def largest_error(out_TNH, exact_TNH) -> float:
    """Infinity where anything is NaN."""
    return float((out_TNH.double() - exact_TNH).abs().nan_to_num(torch.inf, torch.inf).max())


@pytest.mark.parametrize("one_launch", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mixed_rows(make_batch, device, poisoned, dtype, one_launch) -> None:
    q_TNH, inputs = make_batch(MIXED, dtype=dtype, device=device, seed=1)
    out_TNH = gpu.attention(q_TNH, **inputs, block_tokens=16, one_launch=one_launch)
    assert out_TNH.dtype == dtype
    assert largest_error(out_TNH, oracle(q_TNH, inputs)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("head_size", [64, 128])
def test_groups(make_batch, device, poisoned, group, head_size) -> None:
    rows = [(1, 18), (1, 5), (20, 23), (2, 34)]
    shapes = {"num_heads": 2 * group, "num_kv_heads": 2, "head_size": head_size}
    q_TNH, inputs = make_batch(rows, **shapes, device=device, seed=group)
    assert largest_error(gpu.attention(q_TNH, **inputs), oracle(q_TNH, inputs)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("head_size", [2, 16, 80, 96, 192, 256])
def test_head_sizes_by_padding(make_batch, device, poisoned, head_size) -> None:
    q_TNH, inputs = make_batch([(1, 19), (6, 21)], head_size=head_size, device=device, seed=head_size)
    assert largest_error(gpu.attention(q_TNH, **inputs), oracle(q_TNH, inputs)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("block_tokens", [16, 32, 64])
def test_block_and_tile_sizes(make_batch, device, poisoned, block_size, block_tokens) -> None:
    rows = [(1, block_size + 1), (1, block_size - 1), (9, 2 * block_size + 3), (2, block_size)]
    q_TNH, inputs = make_batch(rows, block_size=block_size, device=device, seed=block_size)
    out_TNH = gpu.attention(q_TNH, **inputs, block_tokens=block_tokens)
    assert largest_error(out_TNH, oracle(q_TNH, inputs)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("num_kv_heads", "contexts", "many_shares"),
    [
        (1, (128, 1, 129, 300, 700), (1, 3, 100, None)),
        (8, (2100,), (1, 3)),  # more than the most segments, 16, of the least size
        (2, (1, 1500, 40, 130, 256), (1, 2, 7, 66)),  # one row among the others that is longer than an even share
    ],
)
def test_decode_is_exact_and_equal_however_rows_are_shared(
    make_batch, device, poisoned, num_kv_heads, contexts, many_shares
) -> None:
    rows = [(1, context) for context in contexts]
    q_TNH, inputs = make_batch(rows, num_kv_heads=num_kv_heads, num_heads=8, head_size=16, device=device)
    outs = []
    for shares in many_shares:
        outs.append(dealt_attention(q_TNH, inputs, shares)[0])
    assert largest_error(outs[0], oracle(q_TNH, inputs)) <= TOLERANCE[torch.float32]
    assert all(torch.equal(out_TNH, outs[0]) for out_TNH in outs)


def dealt_by_hand(counts, contexts, seats, shares, least, most, tile):
    """Items and cut rows as the module's docstring has them, row by row."""
    lens = [context if count == 1 else 0 for count, context in zip(counts, contexts, strict=True)]
    share = max(1, ceil(sum(lens) / shares))
    items, cut_rows = [], []
    for row, length in enumerate(lens):
        size = max(least, ceil(length / most / tile) * tile)
        own = ceil(share / size) * size if shares > 1 else max(1, length)
        is_cut = length > own
        cut_rows += [row] * is_cut
        items += [
            (row, seats[row], len(cut_rows) - 1 if is_cut else -1, first, min(first + own, length), size)
            for first in range(0, length, own)
        ]
    return items if shares > 1 else sorted(items, key=lambda item: -item[4]), cut_rows


@pytest.mark.parametrize("shares", [1, 2, 7, 66])
@pytest.mark.parametrize("num_kv_heads", [1, 8])
def test_keys_are_dealt_as_described(make_batch, device, poisoned, num_kv_heads, shares) -> None:
    rows = [(1, 3000), (1, 200), (1, 1), (1, 128), (1, 200), (1, 700), (1, 129), (5, 5000), (1, 33)]
    q_TNH, inputs = make_batch(rows, num_kv_heads=num_kv_heads, num_heads=8, head_size=64, device=device)
    inputs["num_decodes"] = len(rows)
    _, dealt = dealt_attention(q_TNH, inputs, shares)
    columns = ([count for count, _ in rows], [context for _, context in rows], inputs["rows_R"].tolist())
    items, cut_rows = dealt_by_hand(*columns, shares, 128, max_segments(num_kv_heads), 32)
    assert [tuple(item) for item in dealt.items_I6[: len(items)].tolist()] == items
    assert not dealt.items_I6[len(items) :, 3:5].any()
    assert dealt.cut_rows_C.tolist() == cut_rows + [-1] * (len(dealt.cut_rows_C) - len(cut_rows))


def test_shares_fill_the_gpu() -> None:
    few, many, none = (choose_shares(num_rows, num_rows, 8, 132) for num_rows in (8, 9, 56))
    assert few == 33 and many == choose_shares(48, 48, 8, 132) == choose_shares(300, 257, 8, 132) == 66 and none == 1
    assert [choose_programs(8 * num_rows, 132) for num_rows in (1, 4, 8, 11)] == [33, 9, 5, 1]
    assert max_segments(8) == 16 and max_segments(1) == 128


@pytest.mark.parametrize("shares", [1, 8])
def test_longer_rows_and_rows_that_are_not_there_are_left_alone(make_batch, device, poisoned, shares) -> None:
    """Among the first rows, as in a padded step: rows of several tokens, of none, and dummies."""
    q_TNH, inputs = make_batch([(1, 300), (1, 20), (1, 700), (3, 40)], device=device)
    exact_TNH = oracle(q_TNH, inputs)
    for name, last in (("query_starts_R1", 6), ("context_lens_R", 0), ("rows_R", 0)):
        inputs[name] = torch.cat((inputs[name], inputs[name].new_full((2,), last)))
    out_TNH, _ = dealt_attention(q_TNH, inputs | {"num_decodes": 6}, shares)
    assert largest_error(out_TNH[:3], exact_TNH[:3]) <= TOLERANCE[torch.float32]
    assert out_TNH[3:].isnan().all()


@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.parametrize("num_rows", [40, MAX_SORTED_ROWS + 1])
def test_many_rows_of_one_query(make_batch, device, poisoned, num_rows, shares) -> None:
    """More rows than are compared at once, with equals; then than are sorted at all. One is longer than a share."""
    rows = [(1, 900)] + [(1, 1 + 7 * i % 20) for i in range(1, num_rows)]
    q_TNH, inputs = make_batch(rows, num_heads=4, num_kv_heads=1, head_size=16, device=device)
    out_TNH, _ = dealt_attention(q_TNH, inputs, shares)
    assert largest_error(out_TNH, oracle(q_TNH, inputs)) <= TOLERANCE[torch.float32]


def test_many_rows_of_few_queries(make_batch, device, poisoned) -> None:
    """More rows than a program counts at once to find its own."""
    rows = [(2 + i % 3, 5 + i % 4) for i in range(130)]
    q_TNH, inputs = make_batch(rows, num_heads=1, num_kv_heads=1, head_size=16, device=device)
    out_TNH = gpu.attention(q_TNH, **inputs)
    assert largest_error(out_TNH, oracle(q_TNH, inputs)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("shares", [1, 2])
def test_the_only_key_seen_is_returned_to_the_bit(make_batch, device, poisoned, shares) -> None:
    """Alone in its row, or so near the query that the other keys weigh nothing: the rounding of its weight cancels."""
    q_TNH, inputs = make_batch([(1, 1), (1, 140)], num_heads=16, dtype=torch.float16, device=device)
    heads = torch.arange(16, device=device) // 8
    seat = inputs["rows_R"][1]
    block, slot = inputs["block_tables_SM"][seat, 135 // 16], 135 % 16
    q_TNH[1] *= 8
    inputs["kv_2BKPH"][0, block, :, slot] = q_TNH[1, ::8]
    q_TNH[1] = q_TNH[1, ::8][heads]
    first = inputs["block_tables_SM"][inputs["rows_R"][0], 0]
    values = torch.stack((inputs["kv_2BKPH"][1, first, :, 0], inputs["kv_2BKPH"][1, block, :, slot]))
    out_TNH, _ = dealt_attention(q_TNH, inputs, shares)
    assert torch.equal(out_TNH, values[:, heads])


def check_alone(make_batch, device, dtype, rows) -> None:
    """Each row's output is bit-equal alone and among the others, whatever the bounds."""
    q_TNH, inputs = make_batch(rows, num_heads=6, dtype=dtype, device=device)
    out_TNH = gpu.attention(q_TNH, **inputs)
    start = 0
    for i, (count, context) in enumerate(rows):
        alone = {
            **inputs,
            "rows_R": inputs["rows_R"][i : i + 1].clone(),
            "query_starts_R1": torch.tensor([0, count], dtype=torch.int32, device=device),
            "context_lens_R": inputs["context_lens_R"][i : i + 1].clone(),
            "num_decodes": int(count == 1),
            "max_query_len": count,
            "max_context_len": context,
        }
        own_TNH = gpu.attention(q_TNH[start : start + count].clone(), **alone)
        assert torch.equal(own_TNH, out_TNH[start : start + count]), (count, context)
        start += count


def test_a_row_does_not_depend_on_its_neighbours(make_batch, device) -> None:
    check_alone(make_batch, device, torch.float32, [(1, 20), (1, 300), (1, 257), (3, 20), (40, 65)])


def test_chunks_equal_the_whole_prompt(make_batch, device) -> None:
    q_TNH, inputs = make_batch([(50, 50)], device=device)
    whole_TNH = gpu.attention(q_TNH, **inputs)
    for start, end in ((0, 16), (16, 33), (33, 50)):
        chunk = {
            "query_starts_R1": torch.tensor([0, end - start], dtype=torch.int32, device=device),
            "context_lens_R": torch.tensor([end], dtype=torch.int32, device=device),
        }
        out_TNH = gpu.attention(q_TNH[start:end].clone(), **{**inputs, **chunk})
        assert torch.equal(out_TNH, whole_TNH[start:end])


def test_padding_rows_and_tokens_do_no_harm(make_batch, device) -> None:
    """A captured step is padded: rows of no tokens at the end, tokens beyond the last row."""
    q_TNH, inputs = make_batch([(1, 20), (5, 20), (18, 18)], device=device)
    padded = {
        "rows_R": torch.cat((inputs["rows_R"], inputs["rows_R"].new_zeros(2))),
        "query_starts_R1": torch.cat((inputs["query_starts_R1"], inputs["query_starts_R1"][-1:].repeat(2))),
        "context_lens_R": torch.cat((inputs["context_lens_R"], inputs["context_lens_R"].new_ones(2))),
    }
    extra_TNH = torch.cat((q_TNH, torch.full_like(q_TNH, torch.nan)))
    expected = gpu.attention(q_TNH, **inputs)
    for bounds in ({}, {"num_decodes": 5, "max_query_len": 48, "max_context_len": 4096}):
        out_TNH = gpu.attention(extra_TNH, **{**inputs, **padded, **bounds})
        assert torch.equal(out_TNH[: q_TNH.shape[0]], expected)


def test_tile_that_does_not_fit_names_the_largest_that_does() -> None:
    with pytest.raises(ValueError, match="the largest that does is 128"):
        choose_tile(4, 128, 2, 256, 100 * 1024)
    assert choose_tile(4, 128, 2, 128, 100 * 1024).stages == 1
    with pytest.raises(ValueError, match="power of two"):
        choose_tile(4, 128, 2, 48, 100 * 1024)


def test_tiles_that_may_be_paired() -> None:
    limit = 227 * 1024
    assert paired(choose_tile(4, 128, 2, None, limit), 128, 2, limit) == Tile(128, 64, 2, max_registers=128)
    assert paired(choose_tile(4, 64, 2, None, limit), 64, 2, limit) == Tile(128, 64, 2, max_registers=128)
    for head_size, size, keys, some in (
        (128, 2, 128, limit),  # no registers for it
        (256, 2, None, limit),
        (128, 4, None, limit),
        (128, 2, None, 99 * 1024),  # no shared memory
    ):
        alone = choose_tile(4, head_size, size, keys, some)
        assert paired(alone, head_size, size, some) is alone


def test_block_tokens_reaches_the_kernel(make_batch, device) -> None:
    q_TNH, inputs = make_batch([(3, 9)], head_size=256, device=device)
    with pytest.raises(ValueError, match="block_tokens=512"):
        gpu.attention(q_TNH, **inputs, block_tokens=512)


def test_fallbacks_warn_once_and_are_right(make_batch, device, monkeypatch) -> None:
    gpu.warn_once.cache_clear()
    q_TNH, inputs = make_batch([(1, 9), (3, 20)], head_size=3, device=device)
    with pytest.warns(RuntimeWarning, match="head size of 3"):
        out_TNH = gpu.attention(q_TNH, **inputs)
    assert largest_error(out_TNH, oracle(q_TNH, inputs)) <= TOLERANCE[torch.float32]
    wide = {**inputs, "kv_2BKPH": inputs["kv_2BKPH"].double()}
    with pytest.warns(RuntimeWarning, match="float64"):
        assert torch.equal(gpu.attention(q_TNH.double(), **wide), oracle(q_TNH, inputs))
    if device.type == "cpu":
        monkeypatch.setattr(gpu, "is_interpreted", lambda: False)
        with pytest.warns(RuntimeWarning, match="tensors on cpu"):
            gpu.rms_norm(torch.ones(1, 8), torch.ones(8), 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpu.attention(q_TNH, **inputs)
    gpu.warn_once.cache_clear()


def sdpa(q_TNH, inputs):
    """PyTorch's own attention in the inputs' dtype, row by row over gathered pages."""
    out_TNH = torch.empty_like(q_TNH)
    block_size, group = inputs["kv_2BKPH"].shape[3], q_TNH.shape[1] // inputs["kv_2BKPH"].shape[2]
    starts, contexts = inputs["query_starts_R1"].tolist(), inputs["context_lens_R"].tolist()
    for i, seat in enumerate(inputs["rows_R"].tolist()):
        start, end, context = starts[i], starts[i + 1], contexts[i]
        blocks = inputs["block_tables_SM"][seat, : -(-context // block_size)].long()
        kv_2NcH = inputs["kv_2BKPH"][:, blocks].transpose(1, 2).flatten(2, 3)[:, :, :context]
        kv_2NcH = kv_2NcH.repeat_interleave(group, 1)
        mask = torch.ones(end - start, context, dtype=torch.bool, device=q_TNH.device).tril(context - end + start)
        row_NnH = torch.nn.functional.scaled_dot_product_attention(
            q_TNH[None, start:end].transpose(1, 2), *kv_2NcH[:, None], attn_mask=mask, scale=inputs["scale"]
        )[0]
        out_TNH[start:end] = row_NnH.transpose(0, 1)
    return out_TNH


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("group", "head_size", "dtype"),
    [(4, 128, torch.bfloat16), (7, 128, torch.bfloat16), (8, 128, torch.bfloat16)]
    + [(3, 64, torch.bfloat16), (2, 96, torch.bfloat16)]
    + [(7, 64, torch.float16), (1, 96, torch.float16), (4, 128, torch.float16)]
    + [(3, 64, torch.float32), (8, 96, torch.float32), (2, 128, torch.float32)],
)
def test_error_is_near_that_of_sdpa(make_batch, device, poisoned, group, head_size, dtype) -> None:
    rows = [(1, c) for c in (1, 16, 17, 255, 256, 257, 1000, 4100, 5000)]
    rows += [(2, 2), (17, 17), (128, 128), (129, 2000), (300, 300), (512, 1500)]
    block_size = 16 if group % 2 else 64
    q_TNH, inputs = make_batch(
        rows, num_heads=2 * group, head_size=head_size, block_size=block_size, dtype=dtype, device=device, seed=group
    )
    exact_TNH = oracle(q_TNH, inputs)
    theirs = sdpa(q_TNH, inputs).double() - exact_TNH
    for one_launch in (False, True):
        ours = gpu.attention(q_TNH, **inputs, one_launch=one_launch).double() - exact_TNH
        largest = float(ours.abs().nan_to_num(torch.inf).max() / theirs.abs().max())
        rms = float((ours.square().mean() / theirs.square().mean()).sqrt())
        print(f"error over SDPA's, group {group}, head {head_size}, {dtype}: largest {largest:.2f}, rms {rms:.2f}")
        assert largest <= 1.5
        assert rms <= 1.5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_row_does_not_depend_on_its_neighbours_on_a_gpu(make_batch, device, dtype) -> None:
    rows = [(1, 20), (1, 300), (1, 257), (1, 5000), (2, 2), (3, 20), (40, 65), (300, 1000), (129, 129)]
    if dtype != torch.float32:
        rows.append((3000, 3000))  # with it, not alone, the others' programs run in pairs
    check_alone(make_batch, device, dtype, rows)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("block_size", "block_tokens"),
    [(16, 16), (16, 128), (32, 128), (64, 32), (128, 64)],
)
def test_block_and_tile_sizes_on_a_gpu(make_batch, device, block_size, block_tokens) -> None:
    rows = [(1, 700), (200, 700), (64, 64)]
    q_TNH, inputs = make_batch(
        rows, num_heads=8, head_size=128, block_size=block_size, dtype=torch.bfloat16, device=device
    )
    out_TNH = gpu.attention(q_TNH, **inputs, block_tokens=block_tokens)
    assert largest_error(out_TNH, oracle(q_TNH, inputs)) <= 2e-2


@pytest.mark.gpu
def test_cache_beyond_two_to_the_31_elements(make_batch, device) -> None:
    q_TNH, inputs = make_batch([(1, 500), (70, 90)], num_heads=8, head_size=128, dtype=torch.float16, device=device)
    expected_TNH = gpu.attention(q_TNH, **inputs)
    small = inputs["kv_2BKPH"]
    shift = 2**31 // small[0, 0].numel() + 5
    kv_2BKPH = torch.empty((2, shift + small.shape[1], *small.shape[2:]), dtype=torch.float16, device=device)
    kv_2BKPH[:, shift:] = small
    far = {**inputs, "kv_2BKPH": kv_2BKPH, "block_tables_SM": inputs["block_tables_SM"] + shift}
    assert torch.equal(gpu.attention(q_TNH, **far), expected_TNH)
    assert torch.equal(gpu.attention(q_TNH, **far, one_launch=True), gpu.attention(q_TNH, **inputs, one_launch=True))


@pytest.mark.gpu
def test_a_captured_graph_serves_other_lengths(make_batch, device) -> None:
    q_TNH, inputs = make_batch([(1, 600), (1, 20), (30, 40), (9, 90)], dtype=torch.bfloat16, device=device)
    inputs["max_context_len"] = 2000
    gpu.attention(q_TNH, **inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TNH = gpu.attention(q_TNH, **inputs)
    inputs["context_lens_R"].copy_(torch.tensor([100, 300, 39, 50]))
    inputs["query_starts_R1"].copy_(torch.tensor([0, 1, 2, 10, 41]))
    other_q, other = make_batch([(1, 100), (1, 300), (8, 39), (31, 50)], dtype=torch.bfloat16, device=device)
    q_TNH.copy_(other_q)
    inputs["rows_R"].copy_(other["rows_R"])
    inputs["block_tables_SM"][:, : other["block_tables_SM"].shape[1]] = other["block_tables_SM"]
    inputs["kv_2BKPH"][:, : other["kv_2BKPH"].shape[1]] = other["kv_2BKPH"]
    graph.replay()
    assert torch.equal(out_TNH, gpu.attention(q_TNH, **other))
