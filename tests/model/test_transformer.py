"""The decoder against transformers: every family, chunked over several passes, with shuffled block tables."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.config import Configs
from minillm.kernels import cpu, reference
from minillm.model.parallel import TPGroup
from minillm.model.sources import ModelFiles, load_config, load_weights, resolve
from minillm.model.transformer import Transformer
from tests.model.paged import PagedRun

# Three sequences; each step computes a chunk, a decode or nothing of each.
STEPS = [(7, 20, 0), (1, 13, 30), (1, 0, 1), (9, 1, 1), (1, 1, 1)]
LENGTHS = [sum(column) for column in zip(*STEPS, strict=True)]


def sequences_of(vocab_size: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]


def built(files: ModelFiles, ops: ModuleType, **options: Any) -> Transformer:
    model = Transformer(load_config(files), ops=ops, dtype=torch.float32, device="cpu", **options)
    load_weights(model, files)
    return model


@pytest.mark.parametrize("ops", [reference, cpu], ids=["reference", "cpu"])
def test_logits_equal_transformers(tiny_checkpoint: tuple[Path, Any], ops: ModuleType) -> None:
    folder, oracle = tiny_checkpoint
    model = built(resolve(str(folder)), ops)
    sequences = sequences_of(model.config.vocab_size)
    for sequence, logits in zip(sequences, PagedRun(model, sequences).run(STEPS), strict=True):
        with torch.no_grad():
            expected = oracle(torch.tensor([sequence])).logits[0]
        assert expected.abs().max() > 1  # the comparison below means something
        assert (logits - expected).abs().max() <= 1e-4


def test_rotary_table_reaches_the_last_position(tiny_checkpoint: tuple[Path, Any]) -> None:
    folder, oracle = tiny_checkpoint
    model = built(resolve(str(folder)), reference)
    positions = torch.arange(oracle.config.max_position_embeddings)
    cos, sin = oracle.model.rotary_emb(torch.zeros(1), positions[None])
    half = model.config.head_size // 2
    assert model.cos_sin_EH.dtype == torch.float32
    assert torch.equal(model.cos_sin_EH[positions, :half], cos[0, :, :half])
    assert torch.equal(model.cos_sin_EH[positions, half:], sin[0, :, :half])


@torch.inference_mode()
def test_only_wanted_rows_get_logits() -> None:
    model = built(resolve("random:tiny-llama"), reference)
    run = PagedRun(model, sequences_of(512))
    _, batch = run.batch((5, 0, 0))
    whole = model(batch, run.kv_cache, torch.arange(5))
    assert (model(batch, run.kv_cache, torch.tensor([4, 1])) - whole[[4, 1]]).abs().max() < 1e-6
    assert model(batch, run.kv_cache, torch.tensor([], dtype=torch.int64)).shape == (0, 512)


def test_embedding_is_not_changed_by_a_pass() -> None:
    model = built(resolve("random:tiny-qwen3"), reference)
    before = model.embedding.weight.clone()
    PagedRun(model, sequences_of(512)).run(STEPS)
    assert torch.equal(model.embedding.weight, before)


def test_a_step_is_prepared_once_and_before_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU only an ordinary kernel between, the embedding's, makes the kernels of a layer wait for it."""
    calls: list[object] = []
    prepare, attention = cpu.prepare_step, cpu.attention

    def prepare_step(**inputs: Any) -> object:
        calls.append(prepare(**inputs))
        return calls[-1]

    def attend(*args: Any, **inputs: Any) -> Tensor:
        calls.append(inputs["prepared"])
        return attention(*args, **inputs)

    monkeypatch.setattr(cpu, "prepare_step", prepare_step)
    monkeypatch.setattr(cpu, "attention", attend)
    model = built(resolve("random:tiny-llama"), cpu)
    model.embedding.register_forward_pre_hook(lambda module, inputs: calls.append("embedding"))
    PagedRun(model, sequences_of(512)).step([5, 1, 0])
    assert calls[1] == "embedding" and len(calls) == 2 + model.config.num_layers
    assert all(prepared is calls[0] for prepared in calls[2:])


class Ranks:
    """A tensor-parallel group of threads: collectives that wait for every rank."""

    def __init__(self, size: int) -> None:
        self.size, self.slots = size, [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=30)

    def group(self, rank: int) -> TPGroup:
        def exchange(x: Tensor, join: Callable[[list[Tensor]], Tensor]) -> Tensor:
            self.slots[rank] = x
            self.barrier.wait()
            joined = join(self.slots)
            self.barrier.wait()
            return joined

        return TPGroup(
            rank=rank,
            size=self.size,
            all_reduce=lambda x: exchange(x, lambda parts: torch.stack(parts).sum(0)),
            all_gather=lambda x: exchange(x, lambda parts: torch.cat(parts, dim=-1)),
        )


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_ranks_give_the_whole(tiny_checkpoint: tuple[Path, Any], size: int) -> None:
    files = resolve(str(tiny_checkpoint[0]))  # a vocabulary of 163 is no multiple of any size
    sequences = sequences_of(163)
    expected = PagedRun(built(files, reference), sequences).run(STEPS)
    ranks, outs = Ranks(size), {}

    def run(rank: int) -> None:
        model = built(files, reference, tp=ranks.group(rank))
        outs[rank] = PagedRun(model, sequences).run(STEPS)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(size):
        for got, want in zip(outs[rank], expected, strict=True):
            assert (got - want).abs().max() <= 1e-4


@pytest.mark.parametrize("name", [n for n in Configs.names() if n.startswith("tiny-")])
def test_random_weights_are_seeded_and_alive(name: str) -> None:
    files = resolve(f"random:{name}")
    config = load_config(files)
    outs = []
    for seed in (0, 0, 1):
        model = Transformer(config, ops=reference, dtype=torch.float32, device="cpu")
        load_weights(model, files, seed=seed)
        outs.append(PagedRun(model, sequences_of(config.vocab_size)).run(STEPS)[1])
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert outs[0].isfinite().all() and outs[0].std() > 0


def test_weights_have_the_config_s_size() -> None:
    for name in ("tiny-llama", "tiny-qwen3"):
        config = load_config(resolve(f"random:{name}"))
        model = Transformer(config, ops=reference, dtype=torch.bfloat16, device="cpu", max_positions=7)
        norms = sum(w.numel() for n, w in model.named_parameters() if "norm" in n)
        assert model.num_weight_bytes == 2 * (config.num_params + norms)
        assert model.cos_sin_EH.shape == (7, config.head_size)
