"""The offline benchmark: the workloads are the ones it names, its bounds are right, and it runs."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minillm.bench import engines, offline
from minillm.bench.engines import hub_config
from minillm.bench.workload import SHAPES, Shape, Workload, find_shape, make_workload
from minillm.config import Configs, EngineConfig, ModelConfig
from minillm.errors import ConfigError
from minillm.model.checkpoint_config import config_from_folder
from minillm.model.sources import load_config, resolve
from minillm.runtime.runner import Runner

TINY = Configs.TINY_LLAMA


def test_nano_is_the_draw_of_its_original() -> None:
    """nano-vllm draws all prompts, then all output lengths, from `random` seeded with 0."""
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    lengths = [random.randint(100, 1024) for _ in prompts]
    nano = make_workload("nano", SHAPES["nano"], vocab_size=151936)
    assert (nano.prompts, nano.max_tokens, nano.temperature) == (prompts, lengths, 0.6)
    assert nano.num_output_tokens == 133_966


@pytest.mark.parametrize("name", SHAPES)
def test_token_ids_fit_the_vocabulary(name: str) -> None:
    workload = make_workload(name, SHAPES[name], vocab_size=100)
    assert {token for prompt in workload.prompts for token in prompt} <= set(range(100))
    assert workload.is_equal_length == (name != "nano")


def test_sizes_can_be_given() -> None:
    assert find_shape("bs64", 2, 3, 4) == Shape(num_prompts=2, input_len=3, output_len=4)
    assert find_shape("bs64", None, None, 4) == Shape(num_prompts=64, input_len=1024, output_len=4)
    with pytest.raises(ConfigError, match="input_len must be at least 1"):
        find_shape("bs64", None, 0, None)
    with pytest.raises(ConfigError, match="no workload 'made-up'; there are nano"):
        find_shape("made-up", None, None, None)


def test_bytes_moved_step_by_step() -> None:
    """Against a walk over the steps: every step reads the weights, every row its context so far."""
    workload = Workload("made up", [[1] * 5, [1] * 2], [3, 4], 0.0)
    rows = [(len(prompt), n) for prompt, n in zip(workload.prompts, workload.max_tokens, strict=True)]
    num_bytes = 0
    for step in range(1, max(workload.max_tokens) + 1):
        num_bytes += TINY.num_step_params * 2
        num_bytes += sum((length + step) * TINY.kv_bytes_per_token(2) for length, n in rows if step <= n)
    assert workload.bytes_moved(TINY, 2) == num_bytes


def test_prefill_flops_of_one_token() -> None:
    """One token: every matrix once, the head once; two FLOPs a weight, and attention to itself."""
    workload = Workload("made up", [[1]], [1], 0.0)
    attention = 2 * TINY.num_layers * TINY.num_heads * TINY.head_size
    assert workload.prefill_flops(TINY) == 2 * TINY.num_step_params + attention


@pytest.mark.parametrize("name", Configs.names())
def test_peers_get_the_same_shape(name: str, tmp_path: object) -> None:
    """What peers read is what MiniLLM would read from the same config.json."""
    from pathlib import Path

    model = Configs.find(name)
    assert isinstance(model, ModelConfig) and isinstance(tmp_path, Path)
    (tmp_path / "config.json").write_text(json.dumps(hub_config(model)))
    assert config_from_folder(tmp_path) == model


def test_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="no engine 'made-up'; there are minillm, transformers, vllm"):
        offline.run(engines=["made-up"])


def test_mixed_lengths_are_refused_by_transformers_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="equal length"):
        offline.run(
            engines=["transformers"], workloads=["nano"], model="random:tiny-llama", config=EngineConfig(device="cpu")
        )


@pytest.mark.parametrize(("output_len", "share"), [(4, "mbu"), (1, "mfu")])
def test_two_engines_and_two_workloads_in_one_run(
    output_len: int, share: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = offline.run(
        engines=["minillm", "transformers"],
        workloads=["bs64", "bs1"],
        model="random:tiny-llama",
        config=EngineConfig(device="cpu", dtype="float32", num_kv_blocks=64),
        num_prompts=2,
        input_len=8,
        output_len=output_len,
        repeats=3,
    )
    printed = capsys.readouterr().out
    assert [json.loads(text) for text in printed.splitlines() if text.startswith("{")] == lines
    assert [line["workload"] for line in lines] == ["bs64", "bs1"]
    for line in lines:
        assert [row["engine"] for row in line["results"]] == ["minillm", "transformers"]
        for row in line["results"]:
            assert sorted(row["runs"])[1] == row["seconds"] and row[share] > 0
            assert f"│ {row['engine']} " in printed
        assert [line["results"][0][key] for key in ("jit_compiles", "graph_captures")] == [0, 0]
        assert "jit_compiles" not in line["results"][1]
    assert printed.count("minillm was warm") == 2


def test_what_was_compiled_in_the_measured_part_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A runner that compiles a kernel whenever it is asked how many there were: twice for a workload."""
    counts = itertools.count(5)
    monkeypatch.setattr(Runner, "num_compiles", property(lambda self: next(counts)))
    config = EngineConfig(device="cpu", dtype="float32", num_kv_blocks=64)
    [line] = offline.run(
        workloads=["bs1"], model="random:tiny-llama", config=config, input_len=8, output_len=2, repeats=1
    )
    assert line["results"][0]["jit_compiles"] == 1
    assert "not warm: 1 kernels compiled" in " ".join(capsys.readouterr().out.split())


def test_transformers_batches_continuously(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its way on a GPU, here on a CPU with a tiny model: each request ends with as many tokens as it asked for."""
    monkeypatch.setattr(engines.TransformersEngine, "batches_on", ("cpu",))
    model = "random:tiny-qwen3"
    files = resolve(model)
    job = engines.Job(
        model=model,
        files=files,
        model_config=load_config(files),
        engine_config=EngineConfig(gpu_memory_utilization=0.1),
        workloads=[Workload("nano", [[5, 6, 7], [8] * 20, [3] * 9], [5, 9, 3], 0.0)],
        device=torch.device("cpu"),
    )
    engine = engines.TransformersEngine(job)
    for _ in range(2):  # a second workload starts it anew
        engine.prepare(job.workloads[0])
        assert engine.run(job.workloads[0]) == 17
    engine.close()


def test_vllm_gets_the_same_token_ids_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a stand-in that notes what it is asked: vLLM itself is not among what the tests install."""
    asked: dict[str, object] = {}

    class StandIn:
        def __init__(self, **options: object) -> None:
            asked.update(options)
            asked["config"] = json.loads((Path(str(options["model"])) / "config.json").read_text())

        def generate(
            self, prompts: list[dict[str, list[int]]], params: list[dict[str, object]], use_tqdm: bool
        ) -> object:
            asked["prompts"], asked["params"] = prompts, params
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1] * each["max_tokens"])]) for each in params]

    stand_in = SimpleNamespace(__version__="0", LLM=StandIn, SamplingParams=dict)
    monkeypatch.setattr(engines, "optional_import", lambda name: stand_in)
    model = "random:tiny-qwen3"
    workload = Workload("nano", [[5, 6, 7], [8] * 20], [5, 9], 0.6)
    job = engines.Job(
        model=model,
        files=resolve(model),
        model_config=Configs.TINY_QWEN3,
        engine_config=EngineConfig(enable_prefix_caching=False),
        workloads=[workload],
        device=torch.device("cpu"),
    )
    assert engines.VLLMEngine(job).run(workload) == 14
    assert asked["prompts"] == [{"prompt_token_ids": prompt} for prompt in workload.prompts]
    each = {"temperature": 0.6, "ignore_eos": True, "detokenize": False}
    assert asked["params"] == [{"max_tokens": 5, **each}, {"max_tokens": 9, **each}]
    assert asked["load_format"] == "dummy"
    assert asked["enable_prefix_caching"] is False
    assert asked["config"] == hub_config(Configs.TINY_QWEN3)
