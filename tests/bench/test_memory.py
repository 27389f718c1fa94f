"""The memory benchmark: its peaks are measured, and what it says of them follows from them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from minillm.bench import memory
from minillm.bench.memory import MIB, Bounds
from minillm.bench.peak_memory import peak_bytes
from minillm.bench.pictures import check_picture
from minillm.errors import ConfigError

CPU = torch.device("cpu")
SMALL = Bounds(max_length=512, limit_bytes=40 * MIB, num_layers=1, longest=4096)


def test_a_peak_counts_what_lives_at_once() -> None:
    def work() -> torch.Tensor:
        first = torch.zeros(MIB, dtype=torch.uint8)
        second = torch.ones(2 * MIB, dtype=torch.uint8)
        del first
        return torch.cat((second, second))

    before = torch.zeros(8 * MIB)
    assert peak_bytes(work, CPU) == 6 * MIB
    assert peak_bytes(lambda: before.sum() and None, CPU) < 1000
    assert peak_bytes(lambda: None, CPU) == 0


def test_a_peak_counts_what_a_kernel_takes_for_itself() -> None:
    q = torch.randn(1, 8, 512, 64)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert peak_bytes(lambda: attend(q, q, q), CPU) > q.numel() * 4 + 64 * 512 * 4  # the output and a tile of scores


@pytest.fixture(scope="module")
def line() -> dict[str, object]:
    return memory.measure(CPU, SMALL)


def test_attention_grows_with_the_square_and_flash_does_not(line) -> None:
    short, long = line["attention"]
    assert (short["length"], long["length"]) == (256, 512)
    scores_mib = 8 * 512 * 512 * 4 / MIB  # of one row, in float32
    assert long["standard_mib"] > scores_mib and long["standard_mib"] > 3.5 * short["standard_mib"]
    assert long["flash_mib"] < 2.2 * short["flash_mib"] and long["flash_mib"] < long["standard_mib"] / 5
    assert long["saved"] == pytest.approx(1 - long["flash_mib"] / long["standard_mib"], abs=1e-4)


def test_standard_attention_that_would_not_fit_is_not_tried(monkeypatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: (100 * MIB, 100 * MIB))
    rows = list(memory.attention_rows(CPU, torch.float32, 2048))
    assert [row["length"] for row in rows if row["standard_mib"] is None] == [1024, 2048]
    assert all(row["flash_mib"] < 100 for row in rows) and rows[-1]["saved"] is None


def test_a_prefill_is_flat_in_chunks_alone() -> None:
    model = memory.make_model(SMALL)
    whole = [memory.prefill_row(model, length, None) for length in (1024, 4096)]
    chunked = [memory.prefill_row(model, length, 256) for length in (1024, 4096)]
    assert whole[1]["activations_mib"] > 3.5 * whole[0]["activations_mib"]
    copied_mib = (4096 - 1024) * 2 * 512 * 4 / MIB  # a row's keys and values, which a CPU copies up to a bound
    masks_mib = 128 * (4096 - 1024) * 5 / MIB
    assert chunked[1]["activations_mib"] - chunked[0]["activations_mib"] < 1.1 * (copied_mib + masks_mib)
    assert chunked[1]["activations_mib"] < whole[1]["activations_mib"] / 3
    assert [row["cache_mib"] for row in chunked] == [4.0, 16.0]


def test_the_longest_prompt_is_the_last_within_the_limit(line) -> None:
    found = {(row["attention"], row["chunk_size"]): row for row in line["longest"]}
    assert all(row["peak_mib"] <= 40 for row in found.values())
    lengths = [found[kind]["length"] for kind in (("standard", None), ("flash", None), ("flash", 512))]
    assert lengths == sorted(lengths) and lengths[0] < lengths[1] < lengths[2]
    model = memory.make_model(SMALL)
    longer = {1024: 1536, 1536: 2048}[lengths[1]]
    assert sum(memory.prefill_bytes(model, longer, None, "flash")) > SMALL.limit_bytes


def test_it_prints_tables_a_picture_and_one_json_line(line, monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "measure", lambda device, bounds: {**line, "bounds": dataclasses.asdict(bounds)})
    picture = tmp_path / "memory.svg"
    returned = memory.run(max_length=512, picture=picture)
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == returned and returned["bounds"]["max_length"] == 512
    assert "does not fit" not in printed and "longest prompt within 40 MiB" in printed
    drawn = picture.read_text()
    assert drawn.startswith("<?xml") and "svg" in drawn
    missing = [{**row, "standard_mib": None, "saved": None} for row in line["attention"]]
    table = memory.tables_of({**line, "attention": missing})[0]
    assert list(table.columns[1].cells) == ["does not fit"] * 2
    assert "standard" not in memory.panels_of({**line, "attention": missing})[0].lines


def test_bad_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_length must be an integer from 256"):
        memory.run(max_length=1)
    with pytest.raises(ConfigError, match="ends in .svg or .png"):
        check_picture(tmp_path / "memory.txt")
    with pytest.raises(ConfigError, match="is not there"):
        check_picture(tmp_path / "nowhere" / "memory.svg")


@pytest.mark.gpu
def test_peaks_on_a_gpu() -> None:
    device = torch.device("cuda")
    rows = list(memory.attention_rows(device, torch.bfloat16, 2048))
    assert all(row["flash_mib"] < 1 for row in rows)  # tiles live in registers and shared memory
    assert rows[-1]["standard_mib"] > 8 * 2048 * 2048 * 4 / MIB
