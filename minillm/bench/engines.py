"""Engines behind one seam for offline benchmarks: MiniLLM, transformers and vLLM. They know no clock and no figures.

Each is imported when it is asked for. `random:` models get random weights of the same shapes in every engine, made by
that engine; files of a model are read by MiniLLM and transformers alike.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch

from minillm import __version__
from minillm.bench.workload import Workload
from minillm.config import EngineConfig, ModelConfig
from minillm.errors import ConfigError
from minillm.llm import LLM
from minillm.model.sources import ModelFiles
from minillm.runtime.runner import Runner
from minillm.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Job:
    """What an engine is to run."""

    model: str
    files: ModelFiles
    model_config: ModelConfig
    engine_config: EngineConfig
    workloads: Sequence[Workload]
    """All that the engine will be asked to run."""
    device: torch.device

    @property
    def max_model_len(self) -> int:
        """What any of the workloads needs, or what was asked for."""
        return self.engine_config.max_model_len or max(workload.max_len for workload in self.workloads)


class BenchEngine(Protocol):
    """An engine that has loaded a job's model."""

    dtype: torch.dtype
    version: str
    reads_codes: bool
    """Whether few rows are multiplied by a file's 4-bit codes: then it reads less than its dtype says."""

    def prepare(self, workload: Workload) -> None:
        """Get ready for a workload, outside the time that is measured."""

    def run(self, workload: Workload) -> int:
        """Complete the workload; the number of tokens that came out."""

    def one_offs(self) -> dict[str, int]:
        """How often that happened which should end with warming up, by the names of `Metrics`; nothing if unknown."""

    def close(self) -> None:
        """Give the memory back."""


class OwnEngine:
    """MiniLLM through `LLM.generate`."""

    version = __version__

    def __init__(self, job: Job) -> None:
        config = replace(job.engine_config, max_model_len=job.max_model_len)
        self._llm = LLM(job.model, **asdict(config))
        runner = self._llm.engine.runner
        assert isinstance(runner, Runner)
        self.dtype = runner.kv_cache.dtype
        is_gguf = job.files.path is not None and job.files.path.suffix == ".gguf"
        self.reads_codes = is_gguf and config.dtype == "auto" and job.device.type == "cpu"

    def prepare(self, workload: Workload) -> None:
        """Nothing: it was ready when it was made."""

    def run(self, workload: Workload) -> int:
        params = [
            SamplingParams(max_tokens=n, temperature=workload.temperature, ignore_eos=True) for n in workload.max_tokens
        ]
        outputs = self._llm.generate(workload.prompts, params)
        return sum(len(output.token_ids) for output in outputs)

    def one_offs(self) -> dict[str, int]:
        metrics = self._llm.engine.metrics
        return {"jit_compiles": metrics.jit_compiles, "graph_captures": metrics.graph_captures}

    def close(self) -> None:
        self._llm.close()
        del self._llm


class TransformersEngine:
    """transformers: `generate` on prompts of equal length on a CPU, its continuous batching on a GPU."""

    batches_on: ClassVar[tuple[str, ...]] = ("cuda",)
    reads_codes = False

    def __init__(self, job: Job) -> None:
        transformers = optional_import("transformers")
        self.version: str = transformers.__version__
        self.dtype = torch.bfloat16 if job.device.type == "cuda" else torch.float32
        self._is_batching = job.device.type in self.batches_on
        for workload in job.workloads:
            if not self._is_batching and not workload.is_equal_length:
                raise ConfigError(
                    f"transformers on a CPU runs requests of equal length alone; {workload.name!r} has mixed ones. "
                    "Give --input-len and --output-len, or take a cpu- workload"
                )
        self._transformers = transformers
        self._memory_share = job.engine_config.gpu_memory_utilization
        self._model = load_in_transformers(transformers, job, self.dtype)
        self._stack = ExitStack()
        self._manager: Any = None

    def prepare(self, workload: Workload) -> None:
        """Settings for its lengths and temperature; on a GPU its continuous batching is started."""
        self._stack.close()
        self._generation_config = self._transformers.GenerationConfig(
            do_sample=workload.temperature > 0,
            temperature=workload.temperature or None,
            max_new_tokens=max(workload.max_tokens),
            eos_token_id=None,
            pad_token_id=0,
        )
        self._model.generation_config = self._generation_config  # its own would bring end tokens back
        if self._is_batching:
            self._manager = self._start_batching(workload)

    def _start_batching(self, workload: Workload) -> Any:
        """Start continuous batching as `generate_batch` does, but once for all runs."""
        batching = importlib.import_module("transformers.generation.continuous_batching.utils")
        configs = importlib.import_module("transformers.generation.configuration_utils")
        hints = batching.WorkloadHints(
            max_prompt_length=max(map(len, workload.prompts)),
            max_generated_length=max(workload.max_tokens),
            num_requests=len(workload.prompts),
        )
        batches = self._model.continuous_batching_context_manager(
            generation_config=self._generation_config,
            continuous_batching_config=configs.ContinuousBatchingConfig(max_memory_percent=self._memory_share),
            workload_hints=hints,
        )
        return self._stack.enter_context(batches)

    def run(self, workload: Workload) -> int:
        if self._manager is None:
            ids = torch.tensor(workload.prompts)
            with torch.inference_mode():
                out = self._model.generate(
                    ids, attention_mask=torch.ones_like(ids), generation_config=self._generation_config
                )
            return int(out.numel() - ids.numel())
        for prompt, max_tokens in zip(workload.prompts, workload.max_tokens, strict=True):
            self._manager.add_request(prompt, max_new_tokens=max_tokens, eos_token_id=-1)
        num_left, num_tokens = len(workload.prompts), 0
        while num_left and self._manager.is_running():
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                num_left, num_tokens = num_left - 1, num_tokens + len(result.generated_tokens)
        return num_tokens

    def one_offs(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        self._stack.close()
        del self._model, self._manager


class VLLMEngine:
    """vLLM with random weights (its `dummy` load format), without detokenisation."""

    reads_codes = False

    def __init__(self, job: Job) -> None:
        vllm = optional_import("vllm")
        if not job.model.startswith("random:"):
            raise ConfigError(f"vllm runs random: models here, not {job.model!r}")
        self.version: str = vllm.__version__
        self.dtype = torch.bfloat16
        self._params = vllm.SamplingParams
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(hub_config(job.model_config)))
            self._llm = vllm.LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype="bfloat16",
                max_model_len=job.max_model_len,
                enable_prefix_caching=job.engine_config.enable_prefix_caching,
                gpu_memory_utilization=job.engine_config.gpu_memory_utilization,
            )

    def prepare(self, workload: Workload) -> None:
        """Nothing: it was ready when it was made."""

    def run(self, workload: Workload) -> int:
        params = [
            self._params(temperature=workload.temperature, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in workload.max_tokens
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def one_offs(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm


ENGINES: Mapping[str, Callable[[Job], BenchEngine]] = MappingProxyType(
    {"minillm": OwnEngine, "transformers": TransformersEngine, "vllm": VLLMEngine}
)


def optional_import(name: str) -> Any:
    """A peer's package; raises ConfigError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"--engine {name} needs the package {name}: pip install {name}") from error


def load_in_transformers(transformers: Any, job: Job, dtype: torch.dtype) -> Any:
    """The job's model as transformers has it, in evaluation mode on the job's device."""
    if job.model.startswith("random:"):
        config = hub_config(job.model_config)
        with torch.device(job.device):
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.for_model(**config), dtype=dtype
            )
    else:
        path = job.files.path
        assert path is not None, "only random: models have no files"
        folder, gguf_file = (path.parent, path.name) if path.suffix == ".gguf" else (path, None)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=dtype)
    return model.to(job.device).eval()


def hub_config(model: ModelConfig) -> dict[str, Any]:
    """What the model's config.json would say, for an engine that reads one."""
    name = "qwen3" if model.qk_norm else "qwen2" if model.attention_bias and not model.output_bias else "llama"
    config = {
        "model_type": name,
        "architectures": [f"{name.capitalize()}ForCausalLM"],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_size,
        "max_position_embeddings": model.max_position,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_word_embeddings,
        "attention_bias": model.attention_bias,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    scaling = model.rope_scaling
    if scaling is not None:
        config["rope_scaling"] = {
            "rope_type": scaling.kind,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    return config
