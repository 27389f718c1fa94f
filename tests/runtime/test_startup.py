"""Start-up runs padding in every padded shape, so that no step afterwards compiles a kernel or captures a graph."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from torch import Tensor

from minillm import LLM, SamplingParams
from minillm.runtime.batching import PaddedShapes
from minillm.runtime.cuda_graphs import SAMPLING_KINDS, Finished, StepGraphs, borrowed, padded_shapes, run_each_shape
from minillm.runtime.step_buffer import StepBuffer


class Notes:
    """Stages that note what they are asked to run."""

    def __init__(self) -> None:
        self.layers: list[tuple[int, int, bool]] = []
        self.finished: list[tuple[int, tuple[bool, bool]]] = []
        self.edited: list[tuple[bool, bool]] = []
        self.scored: list[int] = []

    def run_layers(self, columns_5R: Tensor, tokens_T: Tensor, has_drafts: bool) -> Tensor:
        self.layers.append((columns_5R.shape[1], tokens_T.shape[0], has_drafts))
        return torch.zeros(tokens_T.shape[0], 1)

    def finish(self, x_TD: Tensor, samples_3L: Tensor, kind: tuple[bool, bool]) -> Finished:
        assert samples_3L[0].max() < x_TD.shape[0]
        self.finished.append((samples_3L.shape[1], kind))
        return Finished(samples_3L[0], x_TD)

    def finish_edited(self, finished: Finished, kind: tuple[bool, bool]) -> None:
        self.edited.append(kind)

    def finish_scored(self, finished: Finished) -> None:
        self.scored.append(len(finished.samples_L))


@pytest.mark.parametrize("is_drafting", [False, True])
@pytest.mark.parametrize(("max_num_seqs", "max_tokens"), [(20, 300), (256, 8192), (40, 16)])
def test_every_shape_is_run_once(max_num_seqs: int, max_tokens: int, is_drafting: bool) -> None:
    notes, shapes = Notes(), padded_shapes(max_num_seqs, max_tokens, is_drafting)
    run_each_shape(notes, shapes, max_tokens, torch.device("cpu"))
    mixed = [(shapes.num_rows, size, False) for size in (max_tokens, *shapes.mixed_sizes)]
    decodes = [(size, size, False) for size in shapes.decode_sizes]
    drafts = [(size, size, True) for size in shapes.draft_sizes]
    assert bool(drafts) is is_drafting and sorted(notes.layers) == sorted(mixed + decodes + drafts)
    assert sorted(notes.finished) == sorted((size, kind) for size in shapes.decode_sizes for kind in SAMPLING_KINDS)
    assert notes.edited == list(SAMPLING_KINDS) and notes.scored == [shapes.decode_sizes[0]]


def test_no_shape_of_graphs_is_missing() -> None:
    """A shape of rows and tokens for each size; a mixed step has more rows than any decode step."""
    notes = Notes()
    shapes = PaddedShapes(decode_sizes=(1, 2), draft_sizes=(2,), mixed_sizes=(64,), num_rows=3)
    run_each_shape(notes, shapes, 128, torch.device("cpu"))
    assert notes.layers == [(3, 128, False), (3, 64, False), (2, 2, False), (2, 2, True), (1, 1, False)]


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("model", ["random:tiny-qwen3", "random:smollm2-135m"])
def test_steps_compile_and_capture_nothing(model: str, enforce_eager: bool) -> None:
    rng = random.Random(0)
    with LLM(
        model,
        device="cuda",
        max_num_batched_tokens=4096,
        max_num_seqs=40,
        max_model_len=2048,
        num_kv_blocks=6000,
        enforce_eager=enforce_eager,
    ) as llm:
        before = llm.engine.metrics.as_dict()
        for num in (1, 3, 17, 40):  # chunks alone and beside decodes, large steps and small ones
            prompts = [[rng.randrange(5, 500) for _ in range(rng.choice((1, 30, 700, 1900)))] for _ in range(num)]
            kinds = [
                {"temperature": 0.0},
                {"temperature": 0.8, "logprobs": num // 2},
                {"temperature": 0.9, "top_k": 20, "repetition_penalty": 1.1},
            ]
            params = [SamplingParams(max_tokens=9, ignore_eos=True, **kinds[i % 3]) for i in range(num)]
            llm.generate(prompts, params)
        after = llm.engine.metrics.as_dict()
    assert before["jit_compiles"] > 0
    assert before["graph_captures"] > 0 or enforce_eager
    assert [after[key] - before[key] for key in ("jit_compiles", "graph_captures")] == [0, 0]


class Products:
    """Stages of large products of few rows, for which a matrix library shares each sum among programs."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        draw = partial(torch.randn, device="cuda", generator=generator)
        self.weights = [(draw(4096, 14336) / 64).to(torch.bfloat16), (draw(14336, 4096) / 120).to(torch.bfloat16)]

    def run_layers(self, columns_5R: Tensor, tokens_T: Tensor, has_drafts: bool = False) -> Tensor:
        x_TD = (tokens_T[:, None] + torch.arange(4096, device="cuda")).sin().to(torch.bfloat16)
        for _ in range(20):
            x_TD = x_TD @ self.weights[0] @ self.weights[1]
        return x_TD

    def finish(self, x_TD: Tensor, samples_3L: Tensor, kind: tuple[bool, bool]) -> Finished:
        logits_LV = x_TD[samples_3L[0]]
        return Finished(logits_LV.argmax(1), logits_LV)

    def finish_edited(self, finished: Finished, kind: tuple[bool, bool]) -> None:
        """Nothing is edited here."""

    def finish_scored(self, finished: Finished) -> None:
        """Nothing is scored here."""


@pytest.mark.gpu
@torch.inference_mode()
def test_graphs_of_two_engines_run_side_by_side() -> None:
    """A draft model's and its target's: nothing that one writes is the other's, what libraries keep included."""
    device, shapes = torch.device("cuda:0"), padded_shapes(16, 16)
    both = [StepGraphs(Products(seed), shapes, StepBuffer(shapes, device), device) for seed in (1, 2)]
    streams = [torch.cuda.Stream(device) for _ in both]
    expected = []
    for graphs in both:
        x_TD = graphs.run_layers(16, 16, False)
        assert x_TD is not None
        expected.append(x_TD.clone())
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for graphs, stream in zip(both, streams, strict=True):
            with torch.cuda.stream(stream):
                x_TD = graphs.run_layers(16, 16, False)
                assert x_TD is not None
                found.append(x_TD.clone())
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_borrowed_memory_is_the_same_and_is_not_kept(dtype: torch.dtype) -> None:
    x = torch.arange(4000, device="cuda").to(dtype).view(4, 1000)[:, :999]
    same = borrowed(x)
    assert torch.equal(same, x) and (same.dtype, same.stride()) == (dtype, x.stride())
    x[3, 998] = -1
    assert same[3, 998] == -1
    before = torch.cuda.memory_allocated()
    del x
    assert torch.cuda.memory_allocated() < before
