"""Text generation of the classic API: prompts in chunks, then a token of each sequence per pass, the engine's sampling.

It knows token ids, no text.

Shapes: B sequences, S tokens of each, N new tokens, L sequences that still run, V vocabulary.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minillm.classic.config import Configs, check_chunk_size
from minillm.classic.model import MiniLLM, as_sequences
from minillm.errors import RequestError
from minillm.types import MAX_SEED, MIN_TEMPERATURE, SamplingParams, check_int

__all__ = [
    "GenerationConfig",
    "OptimizedInferenceEngine",
    "TextGenerator",
    "chunked_generate_with_kv_cache",
    "generate_tokens",
]


@dataclass(kw_only=True)
class GenerationConfig:
    """How to generate; the meaning of each field is that of SamplingParams."""

    max_new_tokens: int = 100
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    """Noise of the first sequence, of the next ones this + 1, + 2, …; None draws one."""
    chunk_size: int | str | None = None
    """Tokens of each prompt in a pass, or auto; None takes the model's."""
    use_flash_attention: bool | None = None
    """None takes the model's."""

    def check(self) -> SamplingParams:
        """The same as SamplingParams. Raises RequestError or ConfigError, naming the field and its range."""
        check_int("max_new_tokens", self.max_new_tokens, 1, 2**31 - 1)
        if self.chunk_size is not None:
            check_chunk_size(self.chunk_size)
        return SamplingParams(
            max_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
        )


class Sampler:
    """Chooses tokens by the kernel set's `sample`: what a sequence gets depends on its logits and seed alone."""

    def __init__(self, model: MiniLLM, params: SamplingParams, num_sequences: int) -> None:
        self.place, self.params = model.settings.place, params
        first = random.randint(0, MAX_SEED) if params.seed is None else params.seed
        self.seeds = [(first + index) % (MAX_SEED + 1) for index in range(num_sequences)]

    def sample(self, logits_LV: Tensor, rows: Sequence[int], positions: Sequence[int]) -> list[int]:
        """A token for each of `rows`, which is to come at `positions`."""
        params, num = self.params, len(rows)
        is_random = params.temperature >= MIN_TEMPERATURE

        def column(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.place.device)

        tokens_L, _ = self.place.ops.sample(
            logits_LV,
            temperature_L=column([params.temperature if is_random else 0.0] * num, torch.float32),
            top_k_L=column([max(0, params.top_k)] * num, torch.int32),
            top_p_L=column([params.top_p] * num, torch.float32),
            min_p_L=column([params.min_p] * num, torch.float32),
            seeds_L=column([self.seeds[row] for row in rows], torch.int64),
            positions_L=column(list(positions), torch.int32),
            is_random=is_random,
            is_filtered=is_random and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0),
        )
        found: list[int] = tokens_L.tolist()
        return found


def generate_tokens(
    model: MiniLLM, prompts: Sequence[Tensor], config: GenerationConfig
) -> tuple[list[list[int]], dict[str, float]]:
    """New tokens of each prompt, the end token included, and the seconds that they took (see OptimizedInferenceEngine).

    Raises RequestError, ConfigError.
    """
    params = config.check()
    start = time.perf_counter()
    attention = model.attention(config.use_flash_attention, None)
    cache = model.make_cache(max(map(len, prompts)) + params.max_tokens, len(prompts))
    sampler = Sampler(model, params, len(prompts))
    found: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    chunk_size = model.settings.chunk_size if config.chunk_size is None else config.chunk_size
    logits_LV = model.last_logits(prompts, cache, chunk_size, attention)
    prefilled = 0.0
    while rows:
        tokens = sampler.sample(logits_LV, rows, [cache.lengths[row] for row in rows])
        prefilled = prefilled or time.perf_counter()
        for row, token in zip(rows, tokens, strict=True):
            found[row].append(token)
        rows = [row for row in rows if not is_done(found[row], model, params)]
        if rows:
            next_ids = [
                torch.tensor(found[row][-1:] if row in rows else [], dtype=torch.int32) for row in range(len(found))
            ]
            logits_LV = model.last_logits(next_ids, cache, None, attention)
    end = time.perf_counter()
    timing = {
        "total_time": end - start,
        "prefill_time": prefilled - start,
        "decode_time": end - prefilled,
        "tokens_per_second": sum(map(len, found)) / (end - start),
    }
    return found, timing


def is_done(tokens: list[int], model: MiniLLM, params: SamplingParams) -> bool:
    """Whether a sequence has ended."""
    return len(tokens) == params.max_tokens or tokens[-1] in model.config.eos_token_ids


class OptimizedInferenceEngine:
    """Generates from prompts of any lengths, together in one cache."""

    def __init__(self, model: MiniLLM) -> None:
        self.model = model

    def generate(
        self,
        input_ids: Tensor | Sequence[Any],
        generation_config: GenerationConfig | None = None,
        return_timing_info: bool = False,
    ) -> list[Tensor] | tuple[list[Tensor], dict[str, float]]:
        """New tokens of each sequence of `input_ids` [B, S], or of a list of sequences.

        `return_timing_info` gives seconds as well: total_time, of which prefill_time up to the first token and
        decode_time, and tokens_per_second, new tokens of all sequences over total_time.

        Raises RequestError, ConfigError.
        """
        prompts = as_sequences(input_ids, self.model.config.vocab_size)
        tokens, timing = generate_tokens(self.model, prompts, generation_config or GenerationConfig())
        generated = [torch.tensor(each) for each in tokens]
        return (generated, timing) if return_timing_info else generated


def chunked_generate_with_kv_cache(
    model: MiniLLM, input_ids: Tensor, max_new_tokens: int = 100, chunk_size: int | str | None = None, **sampling: Any
) -> Tensor:
    """Prompts and new tokens [B, S + N], like `transformers`; one that ended early is filled with its last token.

    `sampling`: fields of GenerationConfig. Raises TypeError for any other, RequestError, ConfigError.
    """
    config = GenerationConfig(max_new_tokens=max_new_tokens, chunk_size=chunk_size, **sampling)
    prompts = as_sequences(input_ids, model.config.vocab_size)
    if len({len(ids) for ids in prompts}) > 1:
        raise RequestError(
            "input_ids must be sequences of one length: OptimizedInferenceEngine takes others in one batch"
        )
    tokens, _ = generate_tokens(model, prompts, config)
    longest = max(map(len, tokens))
    new_BN = torch.tensor([each + each[-1:] * (longest - len(each)) for each in tokens])
    return torch.cat((torch.stack(prompts), new_BN.to(prompts[0])), dim=1)


class TextGenerator:
    """Generates from a model, or from a small one with random weights that it makes."""

    def __init__(self, model: MiniLLM | None = None, use_flash_attention: bool = True) -> None:
        self.model = MiniLLM(Configs.small()) if model is None else model
        self.use_flash_attention = use_flash_attention

    def generate(
        self, prompt_ids: Tensor, max_new_tokens: int = 50, temperature: float = 1.0, **sampling: Any
    ) -> Tensor:
        """As `chunked_generate_with_kv_cache`."""
        return chunked_generate_with_kv_cache(
            self.model,
            prompt_ids,
            max_new_tokens,
            temperature=temperature,
            use_flash_attention=self.use_flash_attention,
            **sampling,
        )
