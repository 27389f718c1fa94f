"""Flash Attention with a KV cache, token by token, and the generator that does it all."""

import torch

from minillm.classic import Configs, KVCache, MiniLLM, TextGenerator

config = Configs.small()
model = MiniLLM(config)
kv_cache = KVCache(config, batch_size=2)
input_ids = torch.randint(config.vocab_size, (2, 32))

logits = model(input_ids, kv_cache=kv_cache, use_flash_attention=True, flash_block_size=128)
for _ in range(4):
    next_ids = logits[:, -1:].argmax(-1).cpu()
    logits = model(next_ids, kv_cache=kv_cache)
    print(f"tokens {next_ids[:, 0].tolist()}, cache {kv_cache.lengths}")

generator = TextGenerator(model, use_flash_attention=True)
print(generator.generate(prompt_ids=input_ids, max_new_tokens=5, temperature=0.8, seed=1)[:, 32:].tolist())
