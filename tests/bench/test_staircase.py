"""The staircase benchmark: it multiplies what a layer multiplies, at the edges that the scheduler is told of."""

from __future__ import annotations

import json

import pytest
import torch

from minillm.bench import staircase
from minillm.config import Configs, ModelConfig
from minillm.errors import ConfigError
from minillm.kernels import reference
from minillm.model.transformer import Transformer
from minillm.runtime.startup import GPU_DEFAULTS


@pytest.mark.parametrize("config", [Configs.TINY_LLAMA, Configs.TINY_QWEN3])
def test_products_are_those_of_a_layer(config: ModelConfig) -> None:
    """Whose four matrices are the parameters of two dimensions."""
    model = Transformer(config, ops=reference, dtype=torch.float32, device="meta")
    layer = [tuple(parameter.shape) for parameter in model.layers[0].parameters() if parameter.dim() == 2]
    assert sorted(staircase.linear_shapes(config).values()) == sorted(layer)


def test_every_edge_that_the_scheduler_knows_is_measured_with_one_token_more() -> None:
    counts = staircase.token_counts(2048)
    for step in GPU_DEFAULTS.tile_steps:
        assert step > 2048 or {step, step + 1} <= {*counts}


def test_it_runs_and_marks_the_edges(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staircase, "CPU_DEFAULTS", GPU_DEFAULTS)
    line = staircase.run(model="random:tiny-llama", max_tokens=64)
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == line
    assert [row["num_tokens"] for row in line["results"]] == [1, 2, 4, 8, 16, 32, 63, 64, 65]
    for row in line["results"]:
        assert len(row["each_us"]) == 4 and row["us"] == pytest.approx(sum(row["each_us"]), abs=0.05)
    assert [text.split()[1] for text in printed if text.startswith("│") and "%" in text] == ["64"]


def test_no_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_tokens must be at least 1, not 0"):
        staircase.run(max_tokens=0)
