"""The cache: rows of their own lengths, growth, and the interface of transformers' caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minillm.classic import KVCache, MiniLLM
from minillm.errors import RequestError


def pieces(cache_config, batch_size: int, num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    shape = cache_config.freeze().shape
    random = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, batch_size, shape.num_kv_heads, num, shape.head_size, generator=random)
    return key, value


def test_update_appends_and_returns_everything(tiny_config) -> None:
    config = tiny_config()
    cache = KVCache(config, batch_size=3)
    kept = {0: [], 2: []}
    for seed, num in enumerate((5, 1, 17, 40)):
        for layer, parts in kept.items():
            parts.append(pieces(config, 3, num, seed=10 * layer + seed))
            keys, values = cache.update(*parts[-1], layer)
            assert torch.equal(keys, torch.cat([key for key, _ in parts], dim=2))
            assert torch.equal(values, torch.cat([value for _, value in parts], dim=2))
    assert cache.lengths == (63,) * 3
    assert cache.update(*pieces(config, 3, 2), 1)[0].shape[2] == 2  # a layer of its own


def test_rows_have_lengths_of_their_own(tiny_config) -> None:
    config = tiny_config()
    cache = KVCache(config, batch_size=3)
    rows: list[list[torch.Tensor]] = [[], [], []]
    for seed, counts in enumerate(([4, 0, 20], [0, 1, 20], [3, 33, 1])):
        key, value = pieces(config, 3, 40, seed)
        for row, count in enumerate(counts):
            rows[row].append(torch.stack((key, value))[:, row, :, :count])
        got = torch.stack(cache.update(key, value, 0, counts))
    assert cache.lengths == (7, 34, 41) and got.shape[3] == 41
    for row, parts in enumerate(rows):
        expected = torch.cat(parts, dim=2)
        assert torch.equal(got[:, row, :, : expected.shape[2]], expected)
        assert not got[:, row, :, expected.shape[2] :].any()


def test_it_grows_on_demand_with_the_sum_of_the_lengths(tiny_config) -> None:
    config = tiny_config(max_position=1 << 20)
    cache = KVCache(config, batch_size=4)
    small = cache.num_bytes
    cache.reserve([1, 1, 1, 1600])
    block = config.freeze().shape.kv_bytes_per_token(4) * cache.block_size
    assert small <= 2 * block and cache.num_bytes == 103 * block
    cache.reset()
    assert cache.num_bytes == small and cache.lengths == (0,) * 4


def test_growth_keeps_what_is_there_and_the_maximum_bounds_it(tiny_config) -> None:
    config = tiny_config()
    cache = KVCache(config, batch_size=2, max_length=50)
    first = pieces(config, 2, 30)
    cache.update(*first, 1)
    keys, _ = cache.update(*pieces(config, 2, 20, seed=1), 1)
    assert torch.equal(keys[:, :, :30], first[0])
    assert cache.num_bytes == 2 * 4 * config.freeze().shape.kv_bytes_per_token(4) * cache.block_size
    with pytest.raises(RequestError, match="row 0 would hold 51 tokens and the cache's max_length is 50"):
        cache.update(*pieces(config, 2, 1), 1)
    assert cache.update(*pieces(config, 2, 0), 1)[0].shape[2] == 50  # nothing has changed


def test_a_cache_may_be_longer_than_the_model(tiny_config) -> None:
    model, longer = MiniLLM(tiny_config(max_position=32)), MiniLLM(tiny_config(max_position=300))
    ids = torch.randint(163, (1, 300), generator=torch.Generator().manual_seed(0))
    with pytest.raises(RequestError, match="comes to 33 tokens and the model has 32 positions"):
        model(ids[:, :33])
    cache = KVCache(tiny_config(max_position=32), max_length=300)
    got = torch.cat([model(part, kv_cache=cache) for part in ids.split(100, dim=1)], dim=1)
    torch.testing.assert_close(got, longer(ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(RequestError, match="max_length is 300"):
        model(ids[:, :1], kv_cache=cache)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batch_size": 0}, "batch_size must be an integer from 1"),
        ({"max_length": 0}, "max_length must be an integer from 1"),
    ],
)
def test_bad_sizes_are_named(tiny_config, given: dict[str, int], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        KVCache(tiny_config(), **given)


def test_bad_updates_are_refused(tiny_config) -> None:
    config = tiny_config()
    cache = KVCache(config, batch_size=2)
    key, value = pieces(config, 2, 3)
    for wrong, said in (
        ((key[:1], value[:1], 0), r"key must be \[2, 2, tokens, 16\]"),
        ((key, value[:, :, :1], 0), "value must be"),
        ((key, value, 3), "layer must be an integer from 0 to 2"),
        ((key.half(), value.half(), 0), "give the cache's config the model's dtype"),
        ((key, value, 0, [1, 4]), "counts must be 2 integers from 0 to 3"),
        ((key, value, 0, [1]), "counts must be 2 integers from 0 to 3"),
    ):
        with pytest.raises(RequestError, match=said):
            cache.update(*wrong)
    assert cache.lengths == (0, 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 2}, "2 layers of 2 key/value heads of 16 in torch.float32 on cpu and the model has 3 layers"),
        ({"num_layers": 4}, "4 layers"),
        ({"num_kv_heads": 4}, "4 key/value heads"),
        ({"head_size": 32}, "heads of 32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_a_cache_of_another_shape_is_refused(tiny_config, changes: dict[str, Any], said: str) -> None:
    cache = KVCache(tiny_config(**changes))
    with pytest.raises(RequestError, match=said):
        MiniLLM(tiny_config())(torch.ones(1, 5, dtype=torch.long), kv_cache=cache)
    assert cache.lengths == (0,)


def make_hf_model(attention: str) -> Any:
    """A tiny Llama of transformers, of the shape of `tiny_config`."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=163,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attn_implementation=attention,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "top_k": 20}])
def test_transformers_generates_the_same_with_it(tiny_config, attention: str, sampling: dict[str, object]) -> None:
    import transformers

    model = make_hf_model(attention)
    ids = torch.randint(3, 163, (3, 21))
    outputs = []
    for cache in (transformers.DynamicCache(config=model.config), KVCache(tiny_config(), batch_size=3)):
        torch.manual_seed(1)
        wanted = {"max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": None, **sampling}
        outputs.append(model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **wanted))
        assert cache.get_seq_length() == 60
    assert torch.equal(*outputs)
    assert len(set(outputs[0][0, 21:].tolist())) > 5  # not one token again and again


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_reads_a_padded_prompt_in_chunks_with_it(tiny_config, attention: str) -> None:
    import transformers

    model = make_hf_model(attention)
    ids = torch.randint(3, 163, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0  # padding in front
    outputs = []
    for cache in (transformers.DynamicCache(config=model.config), KVCache(tiny_config(), batch_size=2)):
        with torch.no_grad():
            parts = [
                model(ids[:, at : at + 10], attention_mask=mask[:, : at + 10], past_key_values=cache).logits
                for at in range(0, 40, 10)
            ]
        outputs.append(torch.cat(parts, dim=1))
    assert torch.equal(*outputs)
