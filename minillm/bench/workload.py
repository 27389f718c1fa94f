"""Offline workloads: prompts of random token ids and how many tokens each asks for. No engine, no clock.

nano         256 prompts, 100 to 1,024 tokens in and out, temperature 0.6 (nano-vllm's benchmark)
bs1          one prompt of 128 tokens, 512 greedy tokens
bs64         64 prompts of 1,024 tokens, 256 greedy tokens each
prefill      64 prompts of 2,048 tokens, one token each
cpu-bs1      one prompt of 32 tokens, 128 greedy tokens          cpu-*: sized for two cores and a 135M model
cpu-bs16     16 prompts of 64 tokens, 48 greedy tokens each
cpu-prefill  one prompt of 512 tokens, one token
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from minillm.config import ModelConfig
from minillm.errors import ConfigError

MAX_TOKEN_ID = 10_000


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a workload; a pair of lengths is a uniform draw between them."""

    num_prompts: int
    input_len: int | tuple[int, int]
    output_len: int | tuple[int, int]
    temperature: float = 0.0
    repeats: int = 2
    """How often it is run: of two the best counts, of more the median."""


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "nano": Shape(num_prompts=256, input_len=(100, 1024), output_len=(100, 1024), temperature=0.6),
        "bs1": Shape(num_prompts=1, input_len=128, output_len=512),
        "bs64": Shape(num_prompts=64, input_len=1024, output_len=256),
        "prefill": Shape(num_prompts=64, input_len=2048, output_len=1),
        "cpu-bs1": Shape(num_prompts=1, input_len=32, output_len=128, repeats=5),
        "cpu-bs16": Shape(num_prompts=16, input_len=64, output_len=48, repeats=5),
        "cpu-prefill": Shape(num_prompts=1, input_len=512, output_len=1, repeats=5),
    }
)


@dataclass(frozen=True)
class Workload:
    """Prompts, and the tokens that each asks for; end tokens are ignored, so all come."""

    name: str
    prompts: list[list[int]]
    max_tokens: list[int]
    temperature: float

    @property
    def num_input_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        """Tokens that all requests ask for."""
        return sum(self.max_tokens)

    @property
    def max_len(self) -> int:
        """Longest request, prompt and output together."""
        return max(len(prompt) + n for prompt, n in zip(self.prompts, self.max_tokens, strict=True))

    @property
    def is_equal_length(self) -> bool:
        """Whether all prompts and all outputs are of one length."""
        return len({len(prompt) for prompt in self.prompts}) == 1 and len(set(self.max_tokens)) == 1

    def bytes_moved(self, model: ModelConfig, dtype_size: int) -> int:
        """Least bytes that decoding reads: the weights once a step, each row's keys and values once a step.

        The fewest steps are those of the longest output, with all requests in one batch.
        """
        weights = max(self.max_tokens) * model.num_step_params * dtype_size
        contexts = sum(n * len(p) + n * (n + 1) // 2 for p, n in zip(self.prompts, self.max_tokens, strict=True))
        return weights + contexts * model.kv_bytes_per_token(dtype_size)

    def prefill_flops(self, model: ModelConfig) -> int:
        """FLOPs of the prompts: matrices of every layer, causal attention, the head for one token of each prompt."""
        matrices = 2 * self.num_input_tokens * model.num_layers * model.num_layer_params
        squares = sum(len(prompt) ** 2 for prompt in self.prompts)
        attention = 2 * squares * model.num_layers * model.num_heads * model.head_size
        return matrices + attention + 2 * len(self.prompts) * model.vocab_size * model.hidden_size


def make_workload(name: str, shape: Shape, vocab_size: int) -> Workload:
    """Draw a workload, the same for all engines and all times (seed 0)."""
    rng = random.Random(0)
    highest = min(MAX_TOKEN_ID, vocab_size - 1)

    def draw(length: int | tuple[int, int]) -> int:
        return length if isinstance(length, int) else rng.randint(*length)

    prompts = [[rng.randint(0, highest) for _ in range(draw(shape.input_len))] for _ in range(shape.num_prompts)]
    return Workload(name, prompts, [draw(shape.output_len) for _ in prompts], shape.temperature)


def find_shape(name: str, num_prompts: int | None, input_len: int | None, output_len: int | None) -> Shape:
    """The named shape, with the sizes that are given in place of its own. Raises ConfigError."""
    if name not in SHAPES:
        raise ConfigError(f"no workload {name!r}; there are {', '.join(SHAPES)}")
    given = {"num_prompts": num_prompts, "input_len": input_len, "output_len": output_len}
    for key, value in given.items():
        if value is not None and value < 1:
            raise ConfigError(f"{key} must be at least 1, not {value}")
    return replace(SHAPES[name], **{key: value for key, value in given.items() if value is not None})
