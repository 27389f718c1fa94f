"""Memory of attention, time per token with and without a cache, speed by chunk size: small runs of the benchmarks."""

import torch

from minillm.bench.decode import token_row
from minillm.bench.memory import attention_rows
from minillm.classic import Configs, MiniLLM, benchmark_chunked_prefill

model = MiniLLM(Configs.small())
place = model.settings.place

for row in attention_rows(place.device, place.dtype, max_length=1024):
    memory = f"standard {row['standard_mib']:.1f} MiB, flash {row['flash_mib']:.1f} MiB"
    print(f"attention over {row['length']:5} tokens: {memory}, {row['saved']:.1%} saved")
with torch.no_grad():
    for context in (64, 128):
        times = token_row(model, context, read_seconds=0.0)
        print(f"token {context + 1}: {times['cached_ms']:.1f} ms with a cache, {times['uncached_ms']:.1f} ms without")
benchmark_chunked_prefill(model, seq_len=256, chunk_sizes=(64, None), repeats=1)
