"""The naive engine: one sequence, the whole text again for each token, edits of logits as a user would write them."""

from __future__ import annotations

import math
from collections import Counter

import torch

from minillm import LLM, SamplingParams
from minillm.kernels.sampling_reference import sample
from tests.engine.forward import forward_logits


def edited(
    logits_V: torch.Tensor, prompt: list[int], output: list[int], params: SamplingParams, llm: LLM
) -> list[float]:
    """A row's logits with what `params` changes, in vLLM's order; bad words are single tokens or pairs of words."""
    logits = [float(x) for x in logits_V]
    if params.allowed_token_ids is not None:
        logits = [x if token in params.allowed_token_ids else -math.inf for token, x in enumerate(logits)]
    for word in params.bad_words:
        *before, last = llm.tokenizer.encode(word, add_special_tokens=False)
        if not before or output[-len(before) :] == before:
            logits[last] = -math.inf
    if len(output) < params.min_tokens:
        stops = {*params.stop_token_ids, *([] if params.ignore_eos else llm.model_config.eos_token_ids)}
        logits = [-math.inf if token in stops else x for token, x in enumerate(logits)]
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    for token in {*prompt, *output}:
        x = logits[token]
        logits[token] = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
    for token, count in Counter(output).items():
        logits[token] -= params.frequency_penalty * count + params.presence_penalty
    return logits


def generate(llm: LLM, prompt: list[int], params: SamplingParams) -> list[int]:
    """Output tokens; filters and noise are the sampler's own. For models without end tokens."""
    output: list[int] = []
    while len(output) < params.max_tokens and not (output and output[-1] in params.stop_token_ids):
        logits = edited(forward_logits(llm, prompt + output)[-1], prompt, output, params, llm)
        tokens, _ = sample(
            torch.tensor([logits]),
            temperature_L=torch.tensor([params.temperature]),
            top_k_L=torch.tensor([params.top_k]),
            top_p_L=torch.tensor([params.top_p]),
            min_p_L=torch.tensor([params.min_p]),
            seeds_L=torch.tensor([params.seed or 0]),
            positions_L=torch.tensor([len(prompt) + len(output)]),
        )
        output.append(int(tokens[0]))
    return output
