"""Step inputs: a loop over rows, plain torch and the Triton kernel agree on random steps, padding included."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from minillm.kernels import cpu, gpu
from minillm.kernels.step_inputs import StepInputs

FIELDS = ("input_ids_T", "positions_T", "slots_T", "query_starts_R1", "context_lens_R")
BLOCK_SIZE = 16
NUM_SEATS, MAX_BLOCKS = 40, 12


def random_step(seed: int, num_rows: int, num_padding: int, is_decode: bool) -> dict[str, Any]:
    """Arguments of `expand_step_inputs`: rows of one or several tokens, some empty, then tokens that no row owns."""
    draw, torch_draw = random.Random(seed), torch.Generator().manual_seed(seed)
    seats = draw.sample(range(1, NUM_SEATS), num_rows)
    counts = [1 if is_decode else draw.choice([0, 1, 1, 2, 15, 40]) for _ in seats]
    starts = [draw.randrange(BLOCK_SIZE * MAX_BLOCKS - count) for count in counts]
    columns, tokens, at = [], [], 0
    for seat, start, count in zip(seats, starts, counts, strict=True):
        is_on_device = count == 1 and (is_decode or draw.random() < 0.5)
        columns.append([seat, start, count, at, -1 if is_on_device else len(tokens)])
        tokens += [] if is_on_device else [draw.randrange(1, 1000) for _ in range(count)]
        at += count
    tables = torch.randint(1, 500, (NUM_SEATS, MAX_BLOCKS), generator=torch_draw).int()
    tables[0] = 0
    return {
        "columns_5R": torch.tensor(columns, dtype=torch.int32).T.contiguous(),
        "tokens": torch.tensor(tokens, dtype=torch.int32),
        "block_tables_SM": tables,
        "last_tokens_S": torch.randint(1000, 2000, (NUM_SEATS,), generator=torch_draw).int(),
        "block_size": BLOCK_SIZE,
        "num_tokens": at + num_padding,
    }


def naive(step: dict[str, Any]) -> dict[str, list[int]]:
    """Row by row, token by token, in Python."""
    found: dict[str, list[int]] = {name: [] for name in FIELDS}
    tables, tokens = step["block_tables_SM"].tolist(), step["tokens"].tolist()
    end = 0
    for seat, start, count, first, offset in step["columns_5R"].T.tolist():
        found["query_starts_R1"].append(first)
        found["context_lens_R"].append(start + count)
        end = first + count
        for i in range(count):
            position = start + i
            found["input_ids_T"].append(int(step["last_tokens_S"][seat]) if offset < 0 else tokens[offset + i])
            found["positions_T"].append(position)
            found["slots_T"].append(tables[seat][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
    found["query_starts_R1"].append(end)
    for name in FIELDS[:3]:
        found[name] += [0] * (step["num_tokens"] - end)
    return found


def check_equal(got: StepInputs, expected: dict[str, list[int]]) -> None:
    for name in FIELDS:
        tensor = getattr(got, name)
        assert tensor.tolist() == expected[name], name
        assert tensor.dtype == (torch.int64 if name == "slots_T" else torch.int32), name


@pytest.mark.parametrize("expand", [cpu.expand_step_inputs, gpu.expand_step_inputs])
@pytest.mark.parametrize(
    ("num_rows", "num_padding", "is_decode"),
    [(1, 0, True), (1, 5, False), (2, 0, False), (3, 0, True), (7, 130, False), (16, 16, True), (33, 1, False)],
)
def test_expanded_inputs_equal_a_loop_over_rows(expand, num_rows, num_padding, is_decode, device) -> None:
    for seed in range(3):
        step = random_step(seed, num_rows, num_padding, is_decode)
        if step["num_tokens"] == 0:
            continue
        on_device = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in step.items()}
        check_equal(expand(**on_device), naive(step))


def test_rows_of_seat_0_pad_a_step_into_block_0(device) -> None:
    step = random_step(1, 5, 0, True)
    padding = torch.tensor([[0, 0, 1, 5, -1], [0, 0, 1, 6, -1]], dtype=torch.int32).T
    step["columns_5R"] = torch.cat((step["columns_5R"], padding), 1)
    step["num_tokens"] = 7
    for expand in (cpu.expand_step_inputs, gpu.expand_step_inputs):
        got = expand(**{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in step.items()})
        check_equal(got, naive(step))
        assert got.slots_T[5:].tolist() == [0, 0]


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_words() -> None:
    steps = [random_step(seed, 16, 0, True) for seed in (1, 2)]
    fixed = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in steps[0].items()}
    gpu.expand_step_inputs(**fixed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gpu.expand_step_inputs(**fixed)
    for step in steps:
        for name, x in step.items():
            if isinstance(x, torch.Tensor):
                fixed[name].copy_(x)
        graph.replay()
        check_equal(got, naive(step))
