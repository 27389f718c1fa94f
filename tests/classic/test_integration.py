"""Flash Attention, KV cache and generation together. Also a script: `python test_integration.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm import LLM, SamplingParams
from minillm.classic import (
    GenerationConfig,
    KVCache,
    MiniLLM,
    ModelConfig,
    OptimizedInferenceEngine,
    TextGenerator,
    chunked_generate_with_kv_cache,
)
from minillm.errors import ConfigError, RequestError

Maker = Callable[..., Any]


def prompts(num: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(163, (num, length), generator=torch.Generator().manual_seed(seed))


def check_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flash_block_size", [None, 16, 128, 512])
def test_flash_attention_and_cache_equal_standard_attention(tiny_config: Maker, flash_block_size: int | None) -> None:
    model, ids = MiniLLM(tiny_config()), prompts(2, 150)
    expected = model(ids, use_flash_attention=False)
    flash = {"use_flash_attention": True, "flash_block_size": flash_block_size}
    check_close(model(ids, **flash), expected)
    cache = KVCache(tiny_config(), batch_size=2)
    parts = ids.split([100, 1, 1, 47, 1], dim=1)
    check_close(torch.cat([model(part, kv_cache=cache, **flash) for part in parts], dim=1), expected)
    assert cache.lengths == (150, 150)


@pytest.mark.parametrize("is_flash", [True, False])
def test_use_flash_attention_chooses_the_kernel(tiny_config: Maker, monkeypatch, is_flash: bool) -> None:
    from minillm.kernels import cpu, reference

    called = []
    for name, ops in (("flash", cpu), ("standard", reference)):
        plain = ops.attention
        monkeypatch.setattr(ops, "attention", lambda q, n=name, f=plain, **given: called.append(n) or f(q, **given))
    MiniLLM(tiny_config())(prompts(1, 20), use_flash_attention=is_flash)
    MiniLLM(tiny_config(use_flash_attention=is_flash))(prompts(1, 20))
    assert called == ["flash" if is_flash else "standard"] * 6


def test_the_block_size_sets_the_tile_on_a_cpu(tiny_config: Maker, monkeypatch) -> None:
    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *given, **options: masks.append(options["attn_mask"].shape[0]) or attend(*given, **options),
    )
    MiniLLM(tiny_config(num_layers=1))(prompts(1, 150), flash_block_size=64)
    assert masks == [64, 64, 22]


@pytest.mark.parametrize("length", [1, 20])
def test_the_block_size_sets_the_tile_of_the_triton_kernel(tiny_config: Maker, monkeypatch, length: int) -> None:
    """Triton's interpreter stands in for a GPU; rows of one token go to the same kernel."""
    from minillm.classic import config as module
    from minillm.kernels import attention, gpu

    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the test on it does this")
    model = MiniLLM(tiny_config(num_layers=1, head_size=64))
    expected = model(prompts(1, length))
    tiles = []
    choose = attention.choose_tile
    monkeypatch.setattr(attention, "choose_tile", lambda *given: tiles.append(choose(*given)) or tiles[-1])
    monkeypatch.setattr(module, "kernel_set", lambda device: gpu)
    model = MiniLLM(tiny_config(num_layers=1, head_size=64))
    check_close(model(prompts(1, length), flash_block_size=32), expected)
    assert [tile.keys for tile in tiles] == [32]
    with pytest.raises(RequestError, match=r"flash_block_size=1024 does not fit .* the largest that does is 128"):
        model(prompts(1, length), flash_block_size=1024)


@pytest.mark.parametrize("length", [1, 20])
def test_a_block_size_that_does_not_fit_names_the_largest(tiny_config: Maker, length: int) -> None:
    model, cache = MiniLLM(tiny_config()), KVCache(tiny_config())
    for size, said in ((1024, "the largest that does is 512"), (100, "power of two"), (8, "at least 16")):
        with pytest.raises(RequestError, match=f"flash_block_size.*{said}"):
            model(prompts(1, length), kv_cache=cache, flash_block_size=size)
    with pytest.raises(RequestError, match="flash_block_size must be an integer"):
        model(prompts(1, length), flash_block_size="large")
    assert cache.lengths == (0,)  # a pass that failed left nothing


ENGINE_MODEL = "random:tiny-mistral"
SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.7, "seed": 2**63 - 1, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
]


def same_config() -> ModelConfig:
    """The engine's tiny Mistral."""
    return ModelConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=8,
        num_kv_heads=1,
        head_size=16,
        max_position=2048,
        tie_word_embeddings=False,
        dtype="float32",
        device="cpu",
    )


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_it_generates_what_the_engine_generates(sampling: dict[str, Any]) -> None:
    prompt = list(range(7, 60))
    with LLM(ENGINE_MODEL, seed=3, dtype="float32", device="cpu") as llm:
        (output,) = llm.generate([prompt], SamplingParams(max_tokens=40, ignore_eos=True, **sampling))
    model = MiniLLM(same_config(), seed=3)
    ids = chunked_generate_with_kv_cache(model, torch.tensor([prompt]), max_new_tokens=40, chunk_size=16, **sampling)
    assert ids[0].tolist() == prompt + output.token_ids
    assert len(set(output.token_ids)) > 10


def test_sequences_of_different_lengths_generate_what_they_do_alone() -> None:
    model = MiniLLM(same_config())
    engine = OptimizedInferenceEngine(model)
    rows = [prompts(1, length, seed=length)[0] for length in (1, 60, 17, 33)] * 4
    for sampling in ({"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.95}):
        together = engine.generate(rows, GenerationConfig(max_new_tokens=20, seed=1, chunk_size=16, **sampling))
        for index in (0, 1, 6, 15):
            alone = engine.generate([rows[index]], GenerationConfig(max_new_tokens=20, seed=1 + index, **sampling))
            assert torch.equal(alone[0], together[index]) and len(alone[0]) == 20
    assert not torch.equal(together[0], together[4])  # the same prompt, noise of its own


def test_an_end_token_ends_its_sequence_alone() -> None:
    model = MiniLLM(same_config())
    ids = prompts(2, 20)
    config = GenerationConfig(max_new_tokens=12, temperature=0.0)
    free = OptimizedInferenceEngine(model).generate(ids, config)
    ended = same_config()
    at = next(i for i in range(3, 12) if free[0][i] not in free[0][:i] and free[0][i] not in free[1])
    ended.eos_token_id = int(free[0][at])
    model = MiniLLM(ended)
    generated, timing = OptimizedInferenceEngine(model).generate(ids, config, return_timing_info=True)
    assert [each.tolist() for each in generated] == [free[0][: at + 1].tolist(), free[1].tolist()]
    assert timing["total_time"] == pytest.approx(timing["prefill_time"] + timing["decode_time"])
    assert timing["tokens_per_second"] == pytest.approx((at + 13) / timing["total_time"])
    filled = chunked_generate_with_kv_cache(model, ids, max_new_tokens=12, temperature=0.0)
    assert filled.shape == (2, 32) and filled[0, 20 + at :].tolist() == [ended.eos_token_id] * (12 - at)


def test_text_generator(tiny_config: Maker) -> None:
    model, ids = MiniLLM(tiny_config()), prompts(2, 9)
    flash = TextGenerator(model, use_flash_attention=True).generate(ids, max_new_tokens=6, temperature=0.0)
    standard = TextGenerator(model, use_flash_attention=False).generate(ids, max_new_tokens=6, temperature=0.0)
    assert flash.shape == (2, 15) and torch.equal(flash, standard) and torch.equal(flash[:, :9], ids)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_small_types_of_ids_hold_any_new_token(tiny_config: Maker, dtype: torch.dtype) -> None:
    model, ids = MiniLLM(tiny_config(vocab_size=40_000)), prompts(2, 9)
    wanted = {"max_new_tokens": 6, "temperature": 0.0}
    assert torch.equal(
        chunked_generate_with_kv_cache(model, ids.to(dtype), **wanted),
        chunked_generate_with_kv_cache(model, ids, **wanted),
    )


def test_prompts_of_different_lengths_make_no_tensor(tiny_config: Maker) -> None:
    with pytest.raises(RequestError, match="sequences of one length"):
        chunked_generate_with_kv_cache(MiniLLM(tiny_config()), [[1, 2], [3]])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"max_new_tokens": 0}, RequestError, "max_new_tokens must be an integer from 1"),
        ({"max_new_tokens": 250}, RequestError, "comes to 259 tokens and the model has 256 positions"),
        ({"temperature": -1.0}, RequestError, r"temperature must be a number in \[0"),
        ({"top_p": 0.0}, RequestError, r"top_p must be a number in \(0"),
        ({"seed": -1}, RequestError, "seed must be an integer from 0"),
        ({"chunk_size": 0}, ConfigError, "chunk_size must be auto or an integer"),
        ({"made_up": 1}, TypeError, "made_up"),
    ],
)
def test_bad_values_are_named(tiny_config: Maker, given: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        chunked_generate_with_kv_cache(MiniLLM(tiny_config()), prompts(1, 9), **given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_gpu_every_tile_and_chunk_size_gives_the_same_logits(tiny_config: Maker, dtype: str) -> None:
    from minillm.classic import ChunkedPrefillMiniLLM
    from minillm.kernels.attention import choose_tile, shared_memory

    config = tiny_config(device="cuda", dtype=dtype, head_size=64, max_position=2048)
    model = ChunkedPrefillMiniLLM(config, chunk_size=100)
    ids = prompts(2, 700)
    bound = 1e-4 if dtype == "float32" else 0.03
    expected = model(ids, use_flash_attention=False).float()
    largest = 16
    while True:
        try:
            choose_tile(2, 64, config.freeze().place.dtype.itemsize, 2 * largest, shared_memory(torch.device("cuda")))
        except ValueError:
            break
        largest *= 2
    for size in (None, 16, 64, 128):
        assert (model(ids, flash_block_size=size).float() - expected).abs().max() < bound
        got = model.chunked_prefill_forward(ids, flash_block_size=size).float()
        assert (got - expected).abs().max() < bound
    with pytest.raises(RequestError, match=f"the largest that does is {largest}"):
        model(ids, flash_block_size=2 * largest)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
