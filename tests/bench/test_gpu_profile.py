"""The profile's arithmetic, on traces made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.runtime.jit import KernelInterface

from minillm.bench import gpu_profile
from minillm.config import EngineConfig
from minillm.errors import ConfigError
from minillm.kernels import (
    attention,
    dealing,
    decode_attention,
    fused,
    fused_decode,
    hopper_attention,
    hopper_gated,
    hopper_linear,
    hopper_results,
    skinny,
)


def event(name: str, start: float, duration: float, cat: str = "kernel") -> dict[str, Any]:
    return {"name": name, "ts": start, "dur": duration, "cat": cat}


# Two steps of two layers; in each a gap of 1 and two kernels that run side by side. A copy stands between the steps.
EVENTS = [
    event("launch", 0, 5, cat="cuda_runtime"),
    event("expand_kernel", 10, 2),
    event("nvjet_tst", 13, 4),
    event("decode_kernel", 17, 10),
    event("attention_kernel", 19, 6),
    event("Memcpy DtoH", 28, 1, cat="gpu_memcpy"),
    event("expand_kernel", 32, 2),
    event("nvjet_tst", 35, 6),
    event("decode_kernel", 41, 10),
    event("attention_kernel", 43, 6),
]


def test_steps_begin_at_their_first_kernel() -> None:
    found = gpu_profile.read_trace(reversed(EVENTS))
    assert [len(step) for step in found.steps] == [5, 4]
    assert [kernel.kind for kernel in found.steps[1]] == ["other", "linears", "decode attention", "prefill attention"]


def test_every_kernel_of_a_layer_has_a_kind() -> None:
    names = [
        name
        for module in (attention, dealing, decode_attention, fused, fused_decode, skinny)
        + (hopper_attention, hopper_gated, hopper_linear, hopper_results)
        for name, value in vars(module).items()
        if isinstance(value, KernelInterface) and name.endswith("_kernel")
    ]
    assert {"attention_kernel", "gated_kernel", "sum_norm_kernel"} <= {*names}
    assert [name for name in names if gpu_profile.Kernel(name, 0, 1, False).kind == "other"] == []


def test_gaps_inside_steps_and_between_them() -> None:
    figures = gpu_profile.summary(gpu_profile.read_trace(EVENTS), num_layers=2)
    assert figures["num_steps"] == 2 and figures["launches_per_layer"] == 2.0
    assert figures["step_us"] == (17 + 19) / 2 and figures["idle_in_step_us"] == 1.0
    assert figures["idle_between_us"] == 5.0  # from 27, where the longest kernel ends, to 32
    assert figures["idle_between_share"] == round(5 / 41, 4)
    kinds = figures["kinds"]
    assert list(kinds) == ["decode attention", "prefill attention", "linears", "other"]
    assert kinds["decode attention"] == {"launches": 2, "mean_us": 10.0, "share": round(20 / 46, 4)}


def test_a_step_is_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    step = gpu_profile.read_trace(EVENTS).steps[0]
    gpu_profile.draw(step, tmp_path / "step.svg")
    assert "decode attention" in (tmp_path / "step.svg").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ConfigError, match="needs a CUDA GPU"):
        gpu_profile.run(model="random:tiny", workload="bs1", max_tokens=1, config=EngineConfig(), picture=None)
