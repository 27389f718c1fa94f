"""config.json -> ModelConfig: old and new spellings, and what is refused because it would run wrongly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from minillm.config import Configs, RopeScaling
from minillm.errors import CheckpointError
from minillm.model.checkpoint_config import config_from_folder

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}


def config_of(folder: Path, **changes: Any) -> Any:
    raw = {k: v for k, v in {**LLAMA_8B, **changes}.items() if v != "absent"}
    (folder / "config.json").write_text(json.dumps(raw))
    return config_from_folder(folder)


def yarn(**changes: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, **changes}}


def test_published_llama_is_the_preset(tmp_path: Path) -> None:
    from dataclasses import replace

    found = config_of(tmp_path)
    assert (found.eos_token_ids, found.bos_token_id) == ((128001, 128009), 128000)
    assert replace(found, eos_token_ids=(), bos_token_id=None) == Configs.LLAMA_3_1_8B


def test_new_spelling_of_rope_equals_the_old(tmp_path: Path) -> None:
    rope = {**LLAMA_8B["rope_scaling"], "rope_theta": 500000.0}
    new = config_of(tmp_path, rope_scaling="absent", rope_theta="absent", rope_parameters=rope)
    assert new == config_of(tmp_path)


def test_generation_config_adds_end_tokens(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [128001, 7]}')
    assert config_of(tmp_path, eos_token_id=128009).eos_token_ids == (128009, 128001, 7)


def test_yarn_lengthens_the_model(tmp_path: Path) -> None:
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "mscale": 2, "mscale_all_dim": 1}
    found = config_of(tmp_path, rope_scaling=rope, max_position_embeddings=32768)
    assert found.max_position == 131072
    assert isinstance(found.rope_scaling, RopeScaling)
    assert found.rope_scaling.attention_factor == pytest.approx(1.2772588 / 1.1386294)


def test_sliding_window_caps_the_context_and_says_so(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "sliding_window": 4096, "rope_scaling": None}
    with pytest.warns(UserWarning, match="contexts end at 4096 tokens"):
        assert config_of(tmp_path, **mistral, max_position_embeddings=32768).max_position == 4096
    assert config_of(tmp_path, **mistral, max_position_embeddings=2048).max_position == 2048
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096, "rope_scaling": None}
    assert config_of(tmp_path, **qwen, use_sliding_window=False).max_position == 131072


def test_families_differ_in_biases_and_norms(tmp_path: Path) -> None:
    def parts(family: str, **changes: Any) -> tuple[bool, bool, bool, bool]:
        found = config_of(tmp_path, architectures=[f"{family}ForCausalLM"], **changes)
        return found.attention_bias, found.output_bias, found.mlp_bias, found.qk_norm

    assert parts("Llama") == (False, False, False, False)
    assert parts("Llama", attention_bias=True, mlp_bias=True) == (True, True, True, False)
    assert parts("Qwen2") == (True, False, False, False)
    assert parts("Qwen3") == (False, False, False, True)
    assert parts("Qwen3", attention_bias=True) == (True, True, False, True)
    assert parts("Mistral") == (False, False, False, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map.*never run"),
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM.*known are LlamaForCausalLM"),
        ({"architectures": "absent"}, "known are"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised by awq"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_size": "absent"}, "lacks 'hidden_size'"),
        ({"num_key_value_heads": 5}, "no multiple"),
        ({"vocab_size": "many"}, "vocab_size must be a whole number"),
        ({"vocab_size": None}, "vocab_size must be a whole number"),
        ({"vocab_size": 1e30}, "vocab_size must be a whole number"),
        ({"vocab_size": 10**30}, "vocab_size must be a whole number from 1 to"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number from 1, not 0"),
        ({"num_attention_heads": 8192, "num_key_value_heads": 1}, "head_size must be a whole number from 1"),
        ({"head_dim": -2}, "head_dim must be a whole number from 1"),
        ({"head_dim": "x"}, "head_dim must be a whole number"),
        ({"max_position_embeddings": -5}, "max_position_embeddings must be a whole number from 1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be a whole number from 1, not 0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a finite number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number above 0"),
        ({"rope_theta": -1.0}, "rope_theta must be a number above 1"),
        ({"rope_theta": 1e300}, "rope_theta must be a number above 1 and below"),
        ({"rope_theta": 1, **yarn()}, "rope_theta must be .* not 1"),
        ({"architectures": 5}, "architectures 5; known are"),
        ({"architectures": [["LlamaForCausalLM"]]}, "known are"),
        ({"quantization_config": "x"}, "quantised by 'x'"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ({"eos_token_id": [-1]}, "eos_token_id must be a token id"),
        ({"bos_token_id": {"a": 1}}, "bos_token_id must be a token id"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": "x"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "factor must be a number above"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor must be a number above"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e-40}}, "factor must be a number above"),
        ({"rope_scaling": {"rope_type": "linear", "factor": math.nan}}, "factor must be a finite number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 10**400}}, "factor must be a finite number"),
        ({"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 4, "factor": 8}}, "below"),
        (yarn(beta_fast=0), "beta_fast must be a number above"),
        (yarn(beta_fast=2, beta_slow=3), "beta_slow 3.0 is above beta_fast 2.0"),
        (yarn(attention_factor=1e39), "attention_factor must be a number above"),
        (yarn(mscale=-10 / math.log(4), mscale_all_dim=1), "mscale and mscale_all_dim must be numbers from 0"),
        (yarn(mscale=1, mscale_all_dim=-10 / math.log(4)), "mscale and mscale_all_dim must be numbers from 0"),
        (yarn(mscale=math.nan), "mscale must be a finite number"),
        (yarn(original_max_position_embeddings=0), "original_max_position_embeddings must be a whole number from 1"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "of their own for some layers"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, not 'false'"),
        ({"attention_bias": 0}, "attention_bias must be true or false"),
        ({"mlp_bias": "no"}, "mlp_bias must be true or false"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": "false"}, "use_sliding_window must be true"),
        ({"sliding_window": "x"}, "sliding_window must be a whole number"),
    ],
)
def test_what_cannot_run_exactly_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_of(tmp_path, **changes)


def test_heads_rotated_whole_may_say_so(tmp_path: Path) -> None:
    assert config_of(tmp_path, partial_rotary_factor=1.0) == config_of(tmp_path)


@pytest.mark.parametrize("ends", ["</s>", {"a": 1}, [1, "x"], -1, True, 1.5])
def test_odd_end_tokens_of_generation_config_name_it(tmp_path: Path, ends: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json .*eos_token_id"):
        config_of(tmp_path)


def test_code_beside_the_config_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    with pytest.raises(CheckpointError, match="auto_map"):
        config_of(tmp_path, auto_map={"AutoConfig": "evil.Config"})
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "[" * 100_000])
def test_damaged_json_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json"):
        config_from_folder(tmp_path)
