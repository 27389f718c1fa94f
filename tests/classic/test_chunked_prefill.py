"""Prompts in chunks: the same logits for any size, less memory. Also a script: `python test_chunked_prefill.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.bench.peak_memory import peak_bytes
from minillm.classic import BatchedChunkedPrefill, ChunkedPrefillMiniLLM, KVCache, MiniLLM, benchmark_chunked_prefill
from minillm.classic.passes import plan_passes
from minillm.errors import ConfigError, RequestError

CPU = torch.device("cpu")
Maker = Callable[..., Any]


def prompts(num: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(163, (num, length), generator=torch.Generator().manual_seed(seed))


def check_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def watched_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each forward pass from now on."""
    from minillm.model.transformer import Transformer

    counts: list[int] = []
    run = Transformer.run_layers
    monkeypatch.setattr(
        Transformer, "run_layers", lambda self, batch, kv: counts.append(len(batch.input_ids_T)) or run(self, batch, kv)
    )
    return counts


@pytest.mark.parametrize("memory_efficient", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 49, 50, 51, 4096])
def test_logits_do_not_depend_on_the_chunk_size(
    tiny_config: Maker, watched_passes: list[int], chunk_size: int, memory_efficient: bool
) -> None:
    config = tiny_config(memory_efficient=memory_efficient)
    model = ChunkedPrefillMiniLLM(config, chunk_size=chunk_size)
    assert isinstance(model, MiniLLM)
    ids = prompts(2, 50)
    whole = model(ids, use_flash_attention=False)
    assert whole.shape == (2, 50, 163) and watched_passes == [100]
    watched_passes.clear()
    check_close(model.chunked_prefill_forward(input_ids=ids, use_flash_attention=True), whole)
    sizes = [2 * min(chunk_size, 50 - at) for at in range(0, 50, chunk_size)] if memory_efficient else [100]
    assert watched_passes == sizes


@pytest.mark.parametrize("memory_efficient", [True, False])
def test_chunks_continue_what_a_cache_holds(tiny_config: Maker, memory_efficient: bool) -> None:
    model = ChunkedPrefillMiniLLM(tiny_config(memory_efficient=memory_efficient), chunk_size=8)
    ids, cache = prompts(3, 70), KVCache(tiny_config(), batch_size=4)
    got = [model.chunked_prefill_forward(part, kv_cache=cache) for part in ids.split([1, 30, 1, 38], dim=1)]
    check_close(torch.cat(got, dim=1), model(ids))
    assert cache.lengths == (70, 70, 70, 0)


def test_without_chunked_prefill_a_prompt_takes_one_pass(tiny_config: Maker, watched_passes: list[int]) -> None:
    model = ChunkedPrefillMiniLLM(tiny_config(enable_chunked_prefill=False), chunk_size=8)
    check_close(model.chunked_prefill_forward(prompts(1, 50)), model(prompts(1, 50)))
    assert watched_passes == [50, 50]


def test_plan_passes_covers_every_token_once() -> None:
    for lengths in ([5], [1, 1, 1], [9, 4, 1, 12], [3, 0, 7]):
        for chunk_size in (None, 1, 2, 4, 100):
            for side_by_side in (False, True):
                passes = plan_passes(lengths, chunk_size, side_by_side=side_by_side)
                tokens = [(part.row, at) for parts in passes for part in parts for at in range(part.start, part.end)]
                assert sorted(tokens) == [(row, at) for row, length in enumerate(lengths) for at in range(length)]
                for parts in passes:
                    sizes = [part.end - part.start for part in parts]
                    assert max(sizes) <= (chunk_size or max(lengths)) and min(sizes) > 0
                    assert [size > 1 for size in sizes] == sorted(size > 1 for size in sizes)
                assert not side_by_side or len(passes) == 1


def test_chunks_keep_memory_flat_and_side_by_side_keeps_the_whole_prompt(tiny_config: Maker) -> None:
    """Peaks of the allocator, beyond weights, cache and logits (a small vocabulary, so that they do not hide it)."""

    def peak(length: int, **changes: Any) -> int:
        config = tiny_config(max_position=2048, intermediate_size=512, vocab_size=163, **changes)
        model = ChunkedPrefillMiniLLM(config, chunk_size=64)
        cache = KVCache(config, max_length=length)
        cache.reserve([length])
        logits_bytes = length * 163 * 4
        return peak_bytes(lambda: model.chunked_prefill_forward(prompts(1, length), kv_cache=cache), CPU) - logits_bytes

    efficient = [peak(length) for length in (512, 2048)]
    whole = [peak(length, memory_efficient=False) for length in (512, 2048)]
    unchunked = peak(2048, enable_chunked_prefill=False)
    per_token = 3 * 512 * 4  # the widest stage of a layer
    assert whole[1] > 2048 * per_token and unchunked > 2048 * per_token
    assert efficient[1] < whole[1] / 3
    assert whole[1] > 3 * whole[0]
    # On a CPU attention copies a layer's keys and values, up to a bound; nothing else grows.
    assert efficient[1] - efficient[0] < (whole[1] - whole[0]) / 8


@pytest.mark.parametrize("max_batch_size", [1, 3, 8])
def test_sequences_of_different_lengths_get_the_logits_that_they_get_alone(
    tiny_config: Maker, watched_passes: list[int], max_batch_size: int
) -> None:
    model = MiniLLM(tiny_config())
    lengths = [40, 1, 33, 7, 40, 2, 100]
    sequences = [prompts(1, length, seed)[0] for seed, length in enumerate(lengths)]
    alone = [model(ids[None])[0] for ids in sequences]
    watched_passes.clear()
    processor = BatchedChunkedPrefill(model=model, chunk_size=16, max_batch_size=max_batch_size)
    results = processor.process_batch([sequences[0].tolist(), *sequences[1:]])
    assert [len(logits) for logits in results] == lengths
    for got, expected in zip(results, alone, strict=True):
        check_close(got, expected)
    assert sum(watched_passes) == sum(lengths), "padding was computed"
    assert max(watched_passes) <= 16 * max_batch_size


def test_batches_are_made_by_length_and_memory(tiny_config: Maker) -> None:
    model = MiniLLM(tiny_config())
    processor = BatchedChunkedPrefill(model, max_batch_size=3)
    lengths = [10, 50, 20, 50, 10, 60, 20]
    assert processor.batches(lengths, 2**40) == [[5, 1, 3], [2, 6, 0], [4]]
    token_bytes = model.config.kv_bytes_per_token(4) + 163 * 4
    room = 2 * 110 * token_bytes  # half of what is free: 110 tokens
    batches = processor.batches(lengths, room)
    assert batches == [[5, 1], [3, 2, 6], [0, 4]]
    assert all(sum(lengths[index] for index in batch) <= 110 for batch in batches)
    assert processor.batches(lengths, 0) == [[index] for index in (5, 1, 3, 2, 6, 0, 4)]


def test_bad_input_is_named(tiny_config: Maker) -> None:
    model = ChunkedPrefillMiniLLM(tiny_config())
    for ids, said in (
        (prompts(1, 5)[0], r"input_ids must be a tensor \[batch, tokens\]"),
        ([[1, 2]], r"input_ids must be a tensor \[batch, tokens\]"),
        (prompts(2, 0), "sequence 0 is empty"),
        (prompts(2, 3).float(), "sequence 0 must be a list of token ids"),
        (prompts(2, 3) + 1j, "sequence 0 must be a list of token ids"),
        (prompts(2, 3).to(torch.complex128), "sequence 0 must be a list of token ids"),
        (torch.tensor([[1], [163]]), "sequence 1 has a token outside the vocabulary: ids are from 0 to 162"),
        (torch.tensor([[1], [-1]]), "sequence 1 has a token outside the vocabulary"),
        (prompts(1, 257), "comes to 257 tokens and the model has 256 positions"),
    ):
        with pytest.raises(RequestError, match=said):
            model.chunked_prefill_forward(ids)
    with pytest.raises(RequestError, match="3 sequences and a KVCache of batch_size 2"):
        model(prompts(3, 4), kv_cache=KVCache(tiny_config(), batch_size=2))
    for build in (lambda: ChunkedPrefillMiniLLM(tiny_config(), chunk_size=0), lambda: BatchedChunkedPrefill(model, -1)):
        with pytest.raises(ConfigError, match="chunk_size must be auto or an integer from 1"):
            build()
    with pytest.raises(RequestError, match="max_batch_size must be an integer from 1"):
        BatchedChunkedPrefill(model, max_batch_size=0)
    with pytest.raises(RequestError, match="holds no sequence"):
        BatchedChunkedPrefill(model).process_batch([])
    model.chunk_size = 0
    with pytest.raises(ConfigError, match="chunk_size must be auto or an integer from 1"):
        model.chunked_prefill_forward(prompts(1, 4))
    for name in ("seq_len", "batch_size", "repeats"):
        with pytest.raises(RequestError, match=f"{name} must be an integer from 1"):
            benchmark_chunked_prefill(model, **{name: 0})


def test_the_benchmark_measures_each_chunk_size(
    tiny_config: Maker, watched_passes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    model = MiniLLM(tiny_config())
    results = benchmark_chunked_prefill(model, seq_len=64, chunk_sizes=(16, None), batch_size=2, repeats=1)
    assert list(results) == [16, None] and watched_passes == [32] * 4 + [128]
    assert all(row["tokens_per_second"] == pytest.approx(128 / row["seconds"]) for row in results.values())
    assert "prefill of 2 x 64 tokens" in capsys.readouterr().out


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q"]))
