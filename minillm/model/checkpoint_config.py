"""ModelConfig from a checkpoint's own description: config.json, or the metadata of a GGUF file.

It refuses what the decoder would compute wrongly: other architectures, quantised weights, code to run, odd settings.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minillm.config import ModelConfig, RopeScaling
from minillm.errors import CheckpointError
from minillm.model.gguf import ROPE_DIVISORS, GGUFFile
from minillm.model.rotary import llama3_divisors

__all__ = ["config_from_folder", "config_from_gguf"]

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
GGUF_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return value


def config_from_folder(folder: Path) -> ModelConfig:
    """The config of a Hugging Face folder. Raises CheckpointError for what cannot be run exactly."""
    path = folder / "config.json"
    raw = read_json(path)
    check_supported(raw, path)
    try:
        config = config_from_json(raw)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path} describes no model that can run: {error}") from error
    generation = folder / "generation_config.json"
    if generation.is_file():
        ends = token_ids(read_json(generation).get("eos_token_id"))
        config = replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + ends)))
    return config


def check_supported(raw: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError for a config that names code, another architecture or quantised weights."""
    if raw.get("auto_map"):
        raise CheckpointError(
            f"{path} has auto_map: the model needs Python code of its own, which is never run; "
            f"use a model of {', '.join(ARCHITECTURES)}"
        )
    architectures = raw.get("architectures") or []
    if len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
        raise CheckpointError(f"{path} has architectures {architectures}; known are {', '.join(ARCHITECTURES)}")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "?")
        raise CheckpointError(f"{path} has weights quantised by {method}; use a plain safetensors or a GGUF version")
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{path} has hidden_act {raw['hidden_act']!r}; only silu is known")


def config_from_json(raw: Mapping[str, Any]) -> ModelConfig:
    """Fields of config.json -> ModelConfig."""
    family = raw["architectures"][0].removesuffix("ForCausalLM")
    num_heads = int(raw["num_attention_heads"])
    has_bias = bool(raw.get("attention_bias", False)) and family != "Qwen2"
    max_position = int(raw["max_position_embeddings"])
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    scaling = rope_scaling(rope, max_position)
    if scaling is not None and scaling.kind == "yarn":
        max_position = max(max_position, int(scaling.factor * scaling.original_max_position))
    return ModelConfig(
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
        head_size=int(raw.get("head_dim") or raw["hidden_size"] // num_heads),
        max_position=windowed(max_position, sliding_window(raw, family)),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
        rope_scaling=scaling,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=has_bias or family == "Qwen2",
        output_bias=has_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=family == "Qwen3",
        eos_token_ids=token_ids(raw.get("eos_token_id")),
        bos_token_id=raw.get("bos_token_id"),
    )


def token_ids(value: Any) -> tuple[int, ...]:
    """One token id, a list of them or None, as a tuple."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(int(v) for v in values)


def sliding_window(raw: Mapping[str, Any], family: str) -> int | None:
    """Tokens that attention looks back on, if the model limits them."""
    is_used = raw.get("use_sliding_window", False) if family.startswith("Qwen") else True
    window = raw.get("sliding_window")
    return int(window) if is_used and window is not None else None


def windowed(max_position: int, window: int | None) -> int:
    """Longest context that is exact without a window: below the window every token is seen anyway."""
    if window is None or window >= max_position:
        return max_position
    warnings.warn(
        f"this model attends to the last {window} tokens only, which is not built: contexts end at {window} tokens",
        stacklevel=2,
    )
    return window


def rope_scaling(rope: Mapping[str, Any], max_position: int) -> RopeScaling | None:
    """The `rope_scaling` (or newer `rope_parameters`) object of config.json. Raises CheckpointError."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or rope.get("truncate", True) is not True:
        raise CheckpointError("rope settings partial_rotary_factor and truncate are not supported")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise CheckpointError(f"rope scaling {kind!r} is not supported; linear, llama3 and yarn are")
    original = int(rope.get("original_max_position_embeddings") or max_position)
    factor = rope.get("factor")
    scaling = RopeScaling(
        kind=kind,
        factor=float(max_position / original if factor is None else factor),
        original_max_position=original,
    )
    if kind == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return replace(scaling, low_freq_factor=low, high_freq_factor=high)
    if kind == "yarn":
        return replace(
            scaling,
            beta_fast=float(rope.get("beta_fast") or 32.0),
            beta_slow=float(rope.get("beta_slow") or 1.0),
            attention_factor=yarn_attention_factor(rope, scaling.factor),
        )
    return scaling


def yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float | None:
    """YaRN's factor on attention where the config sets it, directly or as a ratio of two scales."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    scale, scale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if not scale or not scale_all:
        return None
    if factor <= 1:
        return 1.0
    return float((0.1 * scale * math.log(factor) + 1.0) / (0.1 * scale_all * math.log(factor) + 1.0))


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """The config of a GGUF file. Raises CheckpointError for what cannot be run exactly."""
    if file.architecture not in GGUF_ARCHITECTURES:
        known = ", ".join(GGUF_ARCHITECTURES)
        raise CheckpointError(f"{file.path} has architecture {file.architecture!r}; known are {known}")
    own = {k.removeprefix(f"{file.architecture}."): v for k, v in file.metadata.items()}
    if own.get("expert_count"):
        raise CheckpointError(f"{file.path} is a mixture of experts; only dense models run")
    try:
        return gguf_config(file, own)
    except KeyError as error:
        raise CheckpointError(f"{file.path} lacks {error}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file.path} describes no model that can run: {error}") from error


def gguf_config(file: GGUFFile, own: Mapping[str, Any]) -> ModelConfig:
    """Metadata without the architecture's prefix -> ModelConfig; what has no key is read off the tensor table."""
    tensors, num_heads = file.tensors, int(own["attention.head_count"])
    head_size = int(own.get("attention.key_length") or own["embedding_length"] // num_heads)
    if (
        own.get("rope.dimension_count", head_size) != head_size
        or own.get("attention.value_length", head_size) != head_size
    ):
        raise CheckpointError(f"{file.path} has heads of several sizes, or rotates only a part of them")
    ends = [own.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    config = ModelConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=int(own["embedding_length"]),
        intermediate_size=int(own["feed_forward_length"]),
        num_layers=int(own["block_count"]),
        num_heads=num_heads,
        num_kv_heads=int(own.get("attention.head_count_kv", num_heads)),
        head_size=head_size,
        max_position=windowed(int(own["context_length"]), own.get("attention.sliding_window") or None),
        rms_norm_eps=float(own["attention.layer_norm_rms_epsilon"]),
        rope_theta=float(own.get("rope.freq_base", 10_000.0)),
        rope_scaling=gguf_scaling(own),
        tie_word_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        eos_token_ids=tuple(dict.fromkeys(int(end) for end in ends if end is not None)),
        bos_token_id=own.get("tokenizer.ggml.bos_token_id"),
    )
    return replace(config, rope_scaling=llama3_scaling(file, config)) if ROPE_DIVISORS in tensors else config


def gguf_scaling(own: Mapping[str, Any]) -> RopeScaling | None:
    """Linear or YaRN scaling from `rope.scaling.*`."""
    kind = own.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    original = own.get("rope.scaling.original_context_length")
    rope = {"rope_type": kind, "factor": own["rope.scaling.factor"], "original_max_position_embeddings": original}
    return rope_scaling(rope, int(own["context_length"]))


def llama3_scaling(file: GGUFFile, config: ModelConfig) -> RopeScaling:
    """Llama 3.1's rule, recovered from the divisors that a GGUF stores, and checked against all of them."""
    divisors = torch.from_numpy(file.array(ROPE_DIVISORS).copy()).flatten()
    scaling = RopeScaling(kind="llama3", factor=float(divisors.max()), original_max_position=8192)
    expected = llama3_divisors(config, scaling)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
        raise CheckpointError(f"{file.path} stretches rotary frequencies ({ROPE_DIVISORS}) by an unknown rule")
    return scaling
