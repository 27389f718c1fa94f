"""A prompt in chunks: the same logits as in one pass, then generation from chunked prompts."""

import torch

from minillm.classic import ChunkedPrefillMiniLLM, Configs, KVCache, chunked_generate_with_kv_cache

config = Configs.small()
config.chunk_size = 64
model = ChunkedPrefillMiniLLM(config)
input_ids = torch.randint(config.vocab_size, (2, 200))

whole = model(input_ids)
cache = KVCache(config, batch_size=2)
chunked = model.chunked_prefill_forward(input_ids, kv_cache=cache)
difference = (whole - chunked).abs().max().item()
print(f"{tuple(chunked.shape)} logits in chunks of {model.chunk_size}; largest difference {difference:.1e}")
print(f"the cache holds {cache.lengths} tokens in {cache.num_bytes / 2**20:.1f} MiB")

generated = chunked_generate_with_kv_cache(model, input_ids[:, :20], max_new_tokens=10, chunk_size=8, seed=0)
print("new tokens:", generated[:, 20:].tolist())
