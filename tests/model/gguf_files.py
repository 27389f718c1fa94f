"""Writes a transformers model as a GGUF file, the way converters do: a tool for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from minillm.model.gguf import LAYER_PARTS, WHOLE_PARTS

PART_NAMES = {v: k for k, v in LAYER_PARTS.items()}
WHOLE_NAMES = {v: k for k, v in WHOLE_PARTS.items()}


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor."""
    if name in WHOLE_NAMES:
        return WHOLE_NAMES[name]
    _, _, index, *part, kind = name.split(".")
    return f"blk.{index}.{PART_NAMES['.'.join(part)]}.{kind}"


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Query or key rows as converters of Llama store them: rotary pairs side by side."""
    heads = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: Any, arch: str, quant: str = "F32", extra: dict[str, Any] | None = None) -> None:
    """`quant`: type of the matrices; norms and biases are F32. `extra`: more metadata (str, int or float)."""
    config, kind = model.config, gguf.GGMLQuantizationType[quant]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_eos_token_id(2)
    writer.add_array("test.strings", ["a", "héé", ""])
    writer.add_array("test.numbers", [1.5, -2.0])
    writer.add_bool("test.flag", True)
    for key, value in (extra or {}).items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = tensor.numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = interleaved(weight, heads)
        if weight.ndim == 1 or quant == "F32":
            writer.add_tensor(gguf_name(name), weight)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
