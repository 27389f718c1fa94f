"""The CPU kernel set against the oracle in float64, and each row alone against the same row among others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minillm.kernels import cpu, cpu_linear, reference
from minillm.model.stored import FourBit

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)


def check_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the dtype's rounding, relative to the largest value."""
    bound = TOLERANCE[got.dtype] * float(expected.abs().max())
    error = (got.double() - expected).abs()
    assert bool((error <= bound).all()), f"error {float(error.max())} above {bound}"  # false for NaN too


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 17, cpu_linear.UPCAST_ROWS - 1, cpu_linear.UPCAST_ROWS, 600])
def test_linear_equals_the_oracle_packed_or_not(dtype, has_bias, num_tokens) -> None:
    weight_OD = torch.randn(72, 40).to(dtype)
    bias_O = torch.randn(72).to(dtype) if has_bias else None
    x_TD = torch.randn(num_tokens, 40).to(dtype)
    expected = reference.linear(x_TD.double(), weight_OD.double(), None if bias_O is None else bias_O.double())
    check_close(cpu.linear(x_TD, weight_OD, bias_O), expected)
    packed = cpu.pack_linear(weight_OD.clone())  # the original may go
    got = cpu.linear(x_TD, packed, bias_O)
    assert got.shape == expected.shape and got.dtype == dtype
    check_close(got, expected)


def test_packed_fp32_rows_have_the_same_bits_in_any_batch() -> None:
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("only MKL's AVX-512 products have this property for all shapes")
    packed = cpu.pack_linear(torch.randn(960, 576))
    x_TD = torch.randn(130, 576)
    whole = cpu.linear(x_TD, packed)
    for first, last in ((0, 1), (3, 5), (10, 26), (50, 130)):
        assert torch.equal(cpu.linear(x_TD[first:last], packed), whole[first:last])


def random_codes(num_outputs: int, num_inputs: int, num_codes: int) -> tuple[FourBit, torch.Tensor]:
    """Codes of `num_codes` a row, and the float64 matrix that they stand for."""
    codes_OE = torch.randint(0, 16, (num_outputs, num_codes), dtype=torch.uint8)
    scales_OG, zeros_OG = torch.rand(num_outputs, num_codes // 32) / 8, torch.randn(num_outputs, num_codes // 32)
    groups = codes_OE.view(num_outputs, -1, 32).double()
    numbers = (groups - 8) * scales_OG.double()[..., None] + zeros_OG.double()[..., None]
    return FourBit(codes_OE, scales_OG, zeros_OG), numbers.view(num_outputs, -1, num_inputs).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_codes", [160, 320])
@pytest.mark.parametrize("num_tokens", [1, 3, cpu_linear.MAX_CODED_ROWS, cpu_linear.MAX_CODED_ROWS + 1])
def test_few_rows_are_multiplied_by_codes(dtype, num_codes, num_tokens) -> None:
    if torch.backends.cpu.get_cpu_capability() not in cpu_linear.CODED_CPUS:
        pytest.skip("torch has no vector instructions for codes here")
    codes, weight_OD = random_codes(80, 160, num_codes)
    packed = cpu.pack_linear(weight_OD.to(dtype), codes)
    assert isinstance(packed, cpu.PackedWeight) and packed.coded is not None
    x_TD, bias_O = torch.randn(num_tokens, 160).to(dtype), torch.randn(80).to(dtype)
    expected = reference.linear(x_TD.double(), weight_OD, bias_O.double())
    got = cpu.linear(x_TD, packed, bias_O)
    assert got.dtype == dtype
    is_coded = num_tokens <= cpu_linear.MAX_CODED_ROWS
    bound = TOLERANCE[torch.bfloat16 if is_coded else dtype] * float(expected.abs().max())
    assert bool(((got.double() - expected).abs() <= bound).all())
    # The wide weight, zeroed, shows which of the two was read.
    blank = cpu.pack_linear(torch.zeros(80, 160, dtype=dtype), codes)
    assert torch.equal(cpu.linear(x_TD, blank, bias_O), got) == is_coded


def test_codes_that_torch_cannot_take_fast_are_left(monkeypatch) -> None:
    codes, weight_OD = random_codes(72, 64, 64)
    assert cpu.pack_linear(weight_OD.float(), codes).coded is None  # 72 is no multiple of 16
    codes, weight_OD = random_codes(80, 64, 64)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert cpu.pack_linear(weight_OD.float(), codes).coded is None


def test_other_dtypes_and_devices_are_not_packed() -> None:
    for weight_OD in (torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 4, device="meta")):
        assert cpu.pack_linear(weight_OD) is weight_OD


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_norms_and_silu_equal_the_oracle(dtype, num_tokens) -> None:
    weight_D, x_TD, residual_TD = (torch.randn(*shape, 96).to(dtype) for shape in ((), (num_tokens,), (num_tokens,)))
    check_close(cpu.rms_norm(x_TD, weight_D, 1e-5), reference.rms_norm(x_TD.double(), weight_D.double(), 1e-5))
    sum_TD = x_TD + residual_TD
    got = cpu.add_rms_norm(x_TD, residual_TD, weight_D, 1e-5)
    assert torch.equal(residual_TD, sum_TD)
    check_close(got, reference.rms_norm(sum_TD.double(), weight_D.double(), 1e-5))
    check_close(cpu.silu_mul(x_TD), reference.silu_mul(x_TD.double()))


def rotary_inputs(dtype: torch.dtype, head_size: int, *, has_norm: bool) -> dict[str, Any]:
    num_heads, num_kv_heads, num_tokens, num_blocks, block_size = 6, 2, 7, 5, 16
    angles_Eh = torch.arange(40)[:, None] / 100 ** (torch.arange(head_size // 2) * 2 / head_size)
    return {
        "qkv_TC": torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_size).to(dtype),
        "cos_sin_EH": torch.cat((angles_Eh.cos(), angles_Eh.sin()), -1),
        "positions_T": torch.tensor([0, 1, 39, 5, 6, 7, 3]).int(),
        "slots_T": torch.tensor([16, 17, 79, 31, 32, 33, 50]),
        "kv_2BKPH": torch.full((2, num_blocks, num_kv_heads, block_size, head_size), torch.nan, dtype=dtype),
        "q_norm_H": torch.randn(head_size).to(dtype) if has_norm else None,
        "k_norm_H": torch.randn(head_size).to(dtype) if has_norm else None,
        "eps": 1e-6,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("head_size", [64, 20])
def test_rotary_and_store_equals_the_oracle(dtype, has_norm, head_size, poisoned) -> None:
    inputs = rotary_inputs(dtype, head_size, has_norm=has_norm)
    wide = {name: x.double() if isinstance(x, torch.Tensor) and x.dtype == dtype else x for name, x in inputs.items()}
    before = inputs["qkv_TC"].clone()
    got, expected = cpu.rotary_and_store(**inputs), reference.rotary_and_store(**wide)
    check_close(got, expected)
    assert torch.equal(inputs["qkv_TC"], before)
    is_written = ~wide["kv_2BKPH"].isnan()
    assert torch.equal(~inputs["kv_2BKPH"].isnan(), is_written)  # and nothing else
    check_close(inputs["kv_2BKPH"][is_written], wide["kv_2BKPH"][is_written])


MIXED = [
    (1, 1),
    (1, 15),
    (1, 16),
    (1, 17),
    (1, 17),
    (1, 17),
    (1, 200),
    (2, 2),
    (5, 16),
    (16, 33),
    (300, 300),
    (140, 400),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size", "block_size"),
    [(9, 3, 64, 16), (4, 4, 20, 16), (8, 1, 128, 32), (14, 2, 96, 64)],
)
def test_attention_equals_the_oracle(
    dtype, num_heads, num_kv_heads, head_size, block_size, make_batch, poisoned
) -> None:
    q_TNH, inputs = make_batch(
        MIXED,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
        device=CPU,
    )
    expected = reference.attention(q_TNH.double(), **{**inputs, "kv_2BKPH": inputs["kv_2BKPH"].double()})
    got = cpu.attention(q_TNH, **inputs)
    assert got.dtype == dtype and got.is_contiguous()
    check_close(got, expected)
    # queries as a view into a wider tensor, as rotary_and_store returns them; bounds that are not tight
    view_TNH = torch.cat((q_TNH, q_TNH), 1)[:, :num_heads]
    inputs["max_context_len"] += 3
    assert torch.equal(cpu.attention(view_TNH, **inputs), got)


def test_long_chunks_are_tiled(make_batch, monkeypatch) -> None:
    q_TNH, inputs = make_batch([(100, 100), (50, 170)], dtype=torch.float32, device=CPU)
    expected = reference.attention(q_TNH.double(), **{**inputs, "kv_2BKPH": inputs["kv_2BKPH"].double()})
    monkeypatch.setattr(cpu, "MAX_MASK", 170 * 16)
    shapes = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, **kwargs):
        shapes.append(kwargs["attn_mask"].numel())
        return attend(q, k, v, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    check_close(cpu.attention(q_TNH, **inputs), expected)
    assert len(shapes) == 4 + 4 and max(shapes) <= 170 * 16


def test_what_is_computed_once_per_step_changes_nothing(make_batch) -> None:
    q_TNH, inputs = make_batch(MIXED, num_heads=9, num_kv_heads=3, dtype=torch.float32, device=CPU)
    num_tokens, kv_2BKPH = q_TNH.shape[0], inputs["kv_2BKPH"]
    places = {
        "cos_sin_EH": torch.randn(64, 64),
        "positions_T": torch.randint(64, (num_tokens,), dtype=torch.int32),
        "slots_T": torch.randperm(kv_2BKPH.shape[1] * kv_2BKPH.shape[3])[:num_tokens],
    }
    steers = ("block_tables_SM", "rows_R", "query_starts_R1", "context_lens_R", "num_decodes", "max_context_len")
    prepared = cpu.prepare_step(**places, kv_2BKPH=kv_2BKPH, **{name: inputs[name] for name in steers})
    heads = {"q_norm_H": None, "k_norm_H": None, "eps": 1e-5, "num_heads": 9, "num_kv_heads": 3}
    qkv_TC = torch.randn(num_tokens, 15 * 64)
    stores = []
    for kept in (None, prepared):
        kv = kv_2BKPH.clone()
        rotated = cpu.rotary_and_store(qkv_TC, **places, kv_2BKPH=kv, **heads, prepared=kept)
        stores.append((rotated, kv, cpu.attention(q_TNH, **{**inputs, "kv_2BKPH": kv}, prepared=kept)))
    for alone, shared in zip(*stores, strict=True):
        torch.testing.assert_close(shared, alone, rtol=0, atol=0, equal_nan=True)  # slots of no row are NaN


def watch_masks(monkeypatch) -> list[torch.Size]:
    """Shapes of the masks of every attention call from now on."""
    shapes: list[torch.Size] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, **kwargs):
        shapes.append(kwargs["attn_mask"].shape)
        return attend(q, k, v, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return shapes


@pytest.mark.parametrize("block_tokens", [16, 64, 512])
def test_block_tokens_sets_the_queries_of_a_tile(make_batch, monkeypatch, block_tokens) -> None:
    q_TNH, inputs = make_batch([(600, 700)], dtype=torch.float32, device=CPU)
    expected = cpu.attention(q_TNH, **inputs)
    shapes = watch_masks(monkeypatch)
    check_close(cpu.attention(q_TNH, **inputs, block_tokens=block_tokens), expected)
    assert len(shapes) == -(-600 // block_tokens) and shapes[0][0] == block_tokens


@pytest.mark.parametrize("block_tokens", [0, -16, 8, 48])
def test_a_tile_is_a_power_of_two(make_batch, block_tokens) -> None:
    q_TNH, inputs = make_batch([(1, 9)], device=CPU)
    with pytest.raises(ValueError, match="power of two of at least 16"):
        cpu.attention(q_TNH, **inputs, block_tokens=block_tokens)


def test_a_tile_that_is_too_large_names_the_largest(make_batch) -> None:
    q_TNH, inputs = make_batch([(1, 9)], device=CPU)
    with pytest.raises(ValueError, match="block_tokens=1024 does not fit: the largest that does is 512"):
        cpu.attention(q_TNH, **inputs, block_tokens=1024)


@pytest.mark.parametrize("num_kv_heads", [1, 4, 8])
def test_a_long_context_is_copied_some_heads_at_a_time(make_batch, monkeypatch, num_kv_heads) -> None:
    q_TNH, inputs = make_batch([(20, 170), (5, 33)], num_heads=8, num_kv_heads=num_kv_heads, device=CPU)
    expected = cpu.attention(q_TNH, **inputs)
    monkeypatch.setattr(cpu, "MAX_ROW_BYTES", 3 * 2 * 170 * 64 * 4)  # three heads of the long row
    shapes = watch_masks(monkeypatch)
    assert torch.equal(cpu.attention(q_TNH, **inputs), expected)
    assert len(shapes) == -(-num_kv_heads // 3) + 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_among_others(dtype, make_batch) -> None:
    q_TNH, inputs = make_batch(MIXED, num_heads=9, num_kv_heads=3, dtype=dtype, device=CPU)
    among = cpu.attention(q_TNH, **inputs)
    starts, contexts = inputs["query_starts_R1"].tolist(), inputs["context_lens_R"].tolist()
    for row, context in enumerate(contexts):
        chunk = slice(starts[row], starts[row + 1])
        num_queries = starts[row + 1] - starts[row]
        alone = {
            **inputs,
            "rows_R": inputs["rows_R"][row : row + 1],
            "query_starts_R1": torch.tensor([0, num_queries]).int(),
            "context_lens_R": inputs["context_lens_R"][row : row + 1],
            "num_decodes": int(num_queries == 1),
            "max_query_len": num_queries,
            "max_context_len": context,
        }
        assert torch.equal(cpu.attention(q_TNH[chunk], **alone), among[chunk]), f"row {row}"


def test_equal_rows_are_taken_together_within_the_cache_budget(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "MAX_GATHERED_BYTES", 1000)
    assert list(cpu.alike([20, 20, 20, 7, 7, 300, 300], 20)) == [(0, 2), (2, 3), (3, 5), (5, 6), (6, 7)]
    assert list(cpu.alike([], 20)) == []


def test_the_default_dtype_is_one_that_the_set_packs() -> None:
    assert cpu.default_dtype() in (torch.float32, torch.bfloat16)
