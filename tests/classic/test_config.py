"""Configs are mutable until a model is built, and every bad field is named with its range."""

from __future__ import annotations

import dataclasses

import pytest

from minillm.classic import ChunkedPrefillMiniLLM, Configs, KVCache, ModelConfig
from minillm.classic.chunk_size import auto_chunk_size
from minillm.classic.config import Settings
from minillm.errors import ConfigError

GIB = 2**30


def test_a_config_is_mutable_and_a_model_keeps_what_it_was_built_from(tiny_config) -> None:
    config = tiny_config()
    config.chunk_size = 8
    model = ChunkedPrefillMiniLLM(config)
    config.chunk_size = config.num_layers = config.vocab_size = 1
    assert (model.chunk_size, model.config.num_layers, model.config.vocab_size) == (8, 3, 163)
    for frozen in (model.config, model.settings):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, dataclasses.fields(frozen)[0].name, 1)


def test_each_call_gives_a_config_of_its_own() -> None:
    Configs.medium().chunk_size = 7
    assert Configs.medium().chunk_size == 512


def test_small_is_the_shape_of_the_documents_and_the_others_are_above_it() -> None:
    small = Configs.small()
    small.dtype, small.device = "float32", "cpu"
    assert (small.num_layers, small.hidden_size, small.num_heads) == (8, 512, 8)
    cache = KVCache(small)
    assert cache.max_length == 2048
    cache.reserve([2048])
    assert cache.num_bytes == 64 * 2**20
    sizes = [config.freeze().shape.num_params for config in (small, Configs.medium(), Configs.large())]
    assert sizes == sorted(sizes) and sizes[1] > 1.5 * sizes[0] and sizes[2] > 1.5 * sizes[1]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("chunk_size", 0, "chunk_size must be auto or an integer from 1 to"),
        ("chunk_size", "large", "chunk_size must be auto or an integer from 1 to"),
        ("min_chunk_size", 0, "min_chunk_size must be an integer from 1 to"),
        ("max_chunk_size", 2.5, "max_chunk_size must be an integer from 1 to"),
        ("max_chunk_size", 8, "max_chunk_size 8 is below min_chunk_size 64"),
        ("enable_chunked_prefill", 1, "enable_chunked_prefill must be True or False"),
        ("use_flash_attention", "yes", "use_flash_attention must be True or False"),
        ("memory_efficient", None, "memory_efficient must be True or False"),
        ("tie_word_embeddings", 0, "tie_word_embeddings must be True or False"),
        ("dtype", "int8", "dtype must be one of auto, float32"),
        ("device", 3, "device must be auto, cpu, cuda or cuda:N"),
        ("hidden_size", 65, "hidden_size 65 is no multiple of num_heads 4"),
        ("hidden_size", "wide", "hidden_size and num_heads must be integers from 1"),
        ("num_layers", 0, "num_layers must be a whole number from 1"),
        ("num_kv_heads", 3, "num_heads 4 is no multiple of num_kv_heads 3"),
        ("eos_token_id", -1, "a token id must be a whole number from 0"),
        ("eos_token_id", 10**6, "token 1000000 begins or ends a text, but vocab_size is"),
    ],
)
def test_a_bad_field_is_named_with_its_range(tiny_config, field: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny_config(**{field: value}).freeze()


def settings_for(config: ModelConfig, **changes: object) -> Settings:
    return dataclasses.replace(config.freeze(), **changes)  # type: ignore[arg-type]


def test_auto_takes_the_most_that_memory_holds(tiny_config) -> None:
    settings = tiny_config(intermediate_size=4096, vocab_size=32_000).freeze()
    sizes = [auto_chunk_size(settings, 1, free) for free in (2**10, 2**26, 2**27, 2**28, 2**40)]
    assert sizes == sorted(sizes) and sizes[0] == 64 and sizes[-1] == 512 and len(set(sizes)) > 2


def test_auto_ends_at_an_edge_of_a_stair_and_shares_it_among_the_sequences(tiny_config, monkeypatch) -> None:
    settings = tiny_config().freeze()
    assert auto_chunk_size(settings, 4, 2**40) == 512 // 4
    assert auto_chunk_size(settings, 3, 2**40) == 512 // 3
    from minillm.classic import chunk_size

    stairs = dataclasses.replace(chunk_size.CPU_DEFAULTS, tile_steps=(100, 300, 900), max_num_batched_tokens=800)
    monkeypatch.setattr(chunk_size, "CPU_DEFAULTS", stairs)
    assert auto_chunk_size(settings, 1, 2**40) == 300


def test_auto_stays_between_its_bounds(tiny_config) -> None:
    for low, high in ((1, 100), (64, 128), (300, 400), (100, 100)):
        settings = tiny_config(min_chunk_size=low, max_chunk_size=high).freeze()
        for batch_size in (1, 3, 16):
            for free in (0, 2**20, 2**40):
                assert low <= auto_chunk_size(settings, batch_size, free) <= high


def test_auto_is_used(tiny_config, monkeypatch) -> None:
    from minillm.classic import model as module

    asked = []
    monkeypatch.setattr(module, "auto_chunk_size", lambda *given: asked.append(given) or 5)
    monkeypatch.setattr(module, "free_memory", lambda device: (7 * GIB, 8 * GIB))
    import torch

    model = ChunkedPrefillMiniLLM(tiny_config(), chunk_size="auto")
    planned = []
    monkeypatch.setattr(
        module, "plan_passes", lambda *a, plan=module.plan_passes, **k: planned.append(a) or plan(*a, **k)
    )
    model.chunked_prefill_forward(torch.randint(163, (2, 12)))
    assert [given[1:] for given in asked] == [(2, 7 * GIB)] and planned == [([12, 12], 5)]
