"""Tiny checkpoints made by transformers, one per family, each with odd values where a mistake would hide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

SHAPE: dict[str, Any] = {
    "vocab_size": 163,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN_ROPE, "num_key_value_heads": 4}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("Qwen3", {"head_dim": 24, "rms_norm_eps": 1e-6, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {"num_key_value_heads": 4, "sliding_window": None, "head_dim": 32}),
}


def make_hf_model(family: str, seed: int = 0) -> Any:
    """A transformers model in fp32 with random weights, norms and biases."""
    import transformers

    name, changes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if "norm" in weight_name:
                weight.uniform_(0.5, 1.5)
            elif weight_name.endswith("bias"):
                weight.normal_(0.0, 0.3)
    return model


@pytest.fixture(scope="session", params=list(FAMILIES))
def tiny_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(folder, the transformers model in it)."""
    model = make_hf_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    """A folder of its own with a tiny Llama, for tests that damage it."""
    make_hf_model("llama").save_pretrained(tmp_path)
    return tmp_path
