"""The rotary table: cosines and sines of every position, with the ways to stretch them beyond the training length.

It follows the published rules to the last float32 bit of their common implementation. It knows no layers.

Shapes: E positions, H head size, h = H / 2 frequencies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minillm.config import ModelConfig, RopeScaling

__all__ = ["llama3_divisors", "rotary_table"]


def rotary_table(config: ModelConfig, num_positions: int, device: torch.device) -> Tensor:
    """Table cos_sin_EH (fp32): H/2 cosines, then H/2 sines, of the first positions (RoPE, Su et al. 2021)."""
    scaling = config.rope_scaling
    exponents_h = torch.arange(0, config.head_size, 2, dtype=torch.int64).float() / config.head_size
    periods_h = config.rope_theta**exponents_h
    frequencies_h, magnitude = 1.0 / periods_h, 1.0
    if scaling is not None and scaling.kind == "linear":
        frequencies_h = frequencies_h / scaling.factor
    elif scaling is not None and scaling.kind == "llama3":
        frequencies_h = llama3_frequencies(frequencies_h, scaling)
    elif scaling is not None:
        frequencies_h = yarn_frequencies(periods_h, scaling, config)
        magnitude = yarn_magnitude(scaling)
    positions_E = torch.arange(num_positions, device=device, dtype=torch.float32)
    angles_Eh = positions_E[:, None] * frequencies_h.to(device)
    return torch.cat((angles_Eh.cos() * magnitude, angles_Eh.sin() * magnitude), dim=-1)


def llama3_frequencies(frequencies_h: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's rule: long waves are stretched by `factor`, short ones stay, those between are blended."""
    length, low, high = scaling.original_max_position, scaling.low_freq_factor, scaling.high_freq_factor
    waves_h = 2 * math.pi / frequencies_h
    stretched_h = torch.where(waves_h > length / low, frequencies_h / scaling.factor, frequencies_h)
    blend_h = (length / waves_h - low) / (high - low)
    blended_h = (1 - blend_h) * stretched_h / scaling.factor + blend_h * stretched_h
    is_between_h = (waves_h >= length / high) & (waves_h <= length / low)
    return torch.where(is_between_h, blended_h, stretched_h)


def llama3_divisors(config: ModelConfig, scaling: RopeScaling) -> Tensor:
    """By how much Llama 3.1's rule slows each frequency, [h]: what GGUF files store in its place."""
    exponents_h = torch.arange(0, config.head_size, 2, dtype=torch.int64).float() / config.head_size
    frequencies_h = 1.0 / config.rope_theta**exponents_h
    return frequencies_h / llama3_frequencies(frequencies_h, scaling)


def yarn_frequencies(periods_h: Tensor, scaling: RopeScaling, config: ModelConfig) -> Tensor:
    """YaRN (Peng et al. 2023, section 3.2): waves that turn often in the training length stay, others stretch."""

    def index_turning(num_turns: float) -> float:
        ratio = scaling.original_max_position / (num_turns * 2 * math.pi)
        return config.head_size * math.log(ratio) / (2 * math.log(config.rope_theta))

    low = max(math.floor(index_turning(scaling.beta_fast)), 0)
    high: float = min(math.ceil(index_turning(scaling.beta_slow)), config.head_size - 1)
    if low == high:
        high += 0.001  # a ramp needs some width
    ramp_h = ((torch.arange(len(periods_h), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept_h = 1 - ramp_h
    return 1.0 / (scaling.factor * periods_h) * (1 - kept_h) + 1.0 / periods_h * kept_h


def yarn_magnitude(scaling: RopeScaling) -> float:
    """Factor on cosines and sines that sharpens attention over long contexts (YaRN, section 3.3)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 1.0 if scaling.factor <= 1 else 0.1 * math.log(scaling.factor) + 1.0
