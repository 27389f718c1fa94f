"""ModelConfig from a checkpoint's own description: config.json, or the metadata of a GGUF file.

It refuses what the decoder would compute wrongly: other architectures, quantised weights, code to run, odd settings.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minillm.config import ModelConfig, RopeScaling
from minillm.errors import CheckpointError, ConfigError
from minillm.model.gguf import ROPE_DIVISORS, GGUFFile

__all__ = ["config_from_folder", "config_from_gguf"]

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
GGUF_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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
        try:
            ends = token_ids(read_json(generation), "eos_token_id")
            config = replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + ends)))
        except ConfigError as error:
            raise CheckpointError(f"{generation} cannot be used: {error}") from error
    return config


def whole(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number from 1; the default where there is none or null. Raises KeyError without either, ConfigError."""
    value = raw[key] if default is None else raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key} must be a whole number from 1, not {value!r:.100}")
    return value


def number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number; the default where there is none or null. Raises KeyError without either, and ConfigError."""
    value = raw[key] if default is None else raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise ConfigError(f"{key} must be a finite number, not {value!r:.100}")
    return float(value)


def mapping(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object, empty where there is none. Raises ConfigError."""
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{key} must be an object, not {value!r:.100}")
    return value


def flag(raw: Mapping[str, Any], key: str) -> bool:
    """True or false, false where there is none or null. Raises ConfigError."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false, not {value!r:.100}")
    return bool(value)


def check_supported(raw: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError for a config that names code, another architecture or quantised weights."""
    if raw.get("auto_map"):
        raise CheckpointError(
            f"{path} has auto_map: the model needs Python code of its own, which is never run; "
            f"use a model of {', '.join(ARCHITECTURES)}"
        )
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
        raise CheckpointError(f"{path} has architectures {architectures}; known are {', '.join(ARCHITECTURES)}")
    if raw.get("quantization_config"):
        quantization = raw["quantization_config"]
        method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else repr(quantization)
        raise CheckpointError(f"{path} has weights quantised by {method}; use a plain safetensors or a GGUF version")
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{path} has hidden_act {raw['hidden_act']!r}; only silu is known")
    if raw.get("partial_rotary_factor") not in (None, 1):
        raise CheckpointError(
            f"{path} has partial_rotary_factor {raw['partial_rotary_factor']!r}; only heads rotated whole are known"
        )


def config_from_json(raw: Mapping[str, Any]) -> ModelConfig:
    """Fields of config.json -> ModelConfig."""
    family = raw["architectures"][0].removesuffix("ForCausalLM")
    num_heads = whole(raw, "num_attention_heads")
    has_bias = flag(raw, "attention_bias") and family != "Qwen2"
    max_position = whole(raw, "max_position_embeddings")
    rope = {**mapping(raw, "rope_scaling"), **mapping(raw, "rope_parameters")}
    scaling = rope_scaling(rope, max_position)
    if scaling is not None and scaling.kind == "yarn":
        max_position = max(max_position, int(scaling.factor * scaling.original_max_position))
    return ModelConfig(
        vocab_size=whole(raw, "vocab_size"),
        hidden_size=whole(raw, "hidden_size"),
        intermediate_size=whole(raw, "intermediate_size"),
        num_layers=whole(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=whole(raw, "num_key_value_heads", num_heads),
        head_size=whole(raw, "head_dim", whole(raw, "hidden_size") // num_heads),
        max_position=windowed(max_position, sliding_window(raw, family)),
        rms_norm_eps=number(raw, "rms_norm_eps", 1e-6),
        rope_theta=number(rope, "rope_theta", number(raw, "rope_theta", 10_000.0)),
        rope_scaling=scaling,
        tie_word_embeddings=flag(raw, "tie_word_embeddings"),
        attention_bias=has_bias or family == "Qwen2",
        output_bias=has_bias,
        mlp_bias=flag(raw, "mlp_bias"),
        qk_norm=family == "Qwen3",
        eos_token_ids=token_ids(raw, "eos_token_id"),
        bos_token_id=next(iter(token_ids(raw, "bos_token_id")), None),
    )


def token_ids(raw: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """One token id, a list of them or none, as a tuple. Raises ConfigError."""
    value = raw.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(v, int) or isinstance(v, bool) or v < 0 for v in values):
        raise ConfigError(f"{key} must be a token id or a list of them, not {value!r:.100}")
    return tuple(values)


def sliding_window(raw: Mapping[str, Any], family: str) -> int | None:
    """Tokens that attention looks back on, if the model limits them."""
    is_used = flag(raw, "use_sliding_window") if family.startswith("Qwen") else True
    has_window = is_used and raw.get("sliding_window") not in (None, 0)
    return whole(raw, "sliding_window") if has_window else None


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
    if any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError("rope settings of their own for some layers are not supported")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise CheckpointError(f"rope scaling {kind!r} is not supported; linear, llama3 and yarn are")
    original = whole(rope, "original_max_position_embeddings", max_position)
    scaling = RopeScaling(
        kind=kind,
        factor=number(rope, "factor", max_position / original),
        original_max_position=original,
    )
    if kind == "llama3":
        low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
        return replace(scaling, low_freq_factor=low, high_freq_factor=high)
    if kind == "yarn":
        return replace(
            scaling,
            beta_fast=number(rope, "beta_fast", 32.0),
            beta_slow=number(rope, "beta_slow", 1.0),
            attention_factor=yarn_attention_factor(rope, scaling.factor),
        )
    return scaling


def yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float | None:
    """YaRN's factor on attention where the config sets it, directly or as a ratio of two scales."""
    if rope.get("attention_factor") is not None:
        return number(rope, "attention_factor")
    scale, scale_all = number(rope, "mscale", 0.0), number(rope, "mscale_all_dim", 0.0)
    if min(scale, scale_all) < 0:
        raise ConfigError(f"mscale and mscale_all_dim must be numbers from 0, not {scale} and {scale_all}")
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
    tensors, num_heads = file.tensors, whole(own, "attention.head_count")
    window = "attention.sliding_window"
    head_size = whole(own, "attention.key_length", whole(own, "embedding_length") // num_heads)
    if (
        own.get("rope.dimension_count", head_size) != head_size
        or own.get("attention.value_length", head_size) != head_size
    ):
        raise CheckpointError(f"{file.path} has heads of several sizes, or rotates only a part of them")
    ends = [end for kind in ("eos", "eot") for end in token_ids(own, f"tokenizer.ggml.{kind}_token_id")]
    config = ModelConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=whole(own, "embedding_length"),
        intermediate_size=whole(own, "feed_forward_length"),
        num_layers=whole(own, "block_count"),
        num_heads=num_heads,
        num_kv_heads=whole(own, "attention.head_count_kv", num_heads),
        head_size=head_size,
        max_position=windowed(whole(own, "context_length"), whole(own, window) if own.get(window) else None),
        rms_norm_eps=number(own, "attention.layer_norm_rms_epsilon"),
        rope_theta=number(own, "rope.freq_base", 10_000.0),
        rope_scaling=gguf_scaling(own),
        tie_word_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        eos_token_ids=tuple(dict.fromkeys(ends)),
        bos_token_id=next(iter(token_ids(own, "tokenizer.ggml.bos_token_id")), None),
    )
    return replace(config, rope_scaling=llama3_scaling(file, config)) if ROPE_DIVISORS in tensors else config


def gguf_scaling(own: Mapping[str, Any]) -> RopeScaling | None:
    """Scaling from `rope.scaling.*`, linear where no type is named; its old name is `rope.scale_linear`."""
    if "rope.scale_linear" in own:
        own = {"rope.scaling.factor": own["rope.scale_linear"], **own}
    kind = own.get("rope.scaling.type", "linear" if "rope.scaling.factor" in own else "none")
    if kind == "none":
        return None
    original = own.get("rope.scaling.original_context_length")
    rope = {"rope_type": kind, "factor": own["rope.scaling.factor"], "original_max_position_embeddings": original}
    return rope_scaling(rope, whole(own, "context_length"))


def llama3_scaling(file: GGUFFile, config: ModelConfig) -> RopeScaling:
    """Llama 3.1's rule, recovered from the divisors that a GGUF stores, and checked against all of them."""
    import torch

    from minillm.model.rotary import llama3_divisors
    from minillm.model.stored import StoredTensor

    info = file.tensors[ROPE_DIVISORS]
    divisors = StoredTensor(info.name, info.format, info.shape, file.array(ROPE_DIVISORS)).dense().flatten()
    scaling = RopeScaling(kind="llama3", factor=float(divisors.max()), original_max_position=8192)
    expected = llama3_divisors(config, scaling)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
        raise CheckpointError(f"{file.path} stretches rotary frequencies ({ROPE_DIVISORS}) by an unknown rule")
    return scaling
