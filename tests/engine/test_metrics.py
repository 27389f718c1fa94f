"""What the engine counts: the use of the cache, tokens, steps and ends."""

from __future__ import annotations

import random

from minillm import LLM, SamplingParams

OPTIONS = {"device": "cpu", "dtype": "float32", "max_num_seqs": 64, "block_size": 16, "num_kv_blocks": 3000}


def test_slots_of_allocated_blocks_are_in_use() -> None:
    """With 64 rows of mixed lengths, at least 95 % of the slots that requests hold carry tokens (PagedAttention)."""
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 500) for _ in range(rng.randrange(50, 600))] for _ in range(64)]
    with LLM("random:tiny-llama", **OPTIONS) as llm:
        for prompt in prompts:
            llm.engine.add(prompt, SamplingParams(max_tokens=1000, ignore_eos=True))
        while llm.engine.metrics.num_waiting or llm.engine.metrics.num_steps == 0:
            llm.engine.step()
        metrics = llm.engine.metrics
        assert metrics.num_running == 64
        assert 0.95 <= metrics.kv_utilization < 1.0
        assert 0.3 < metrics.kv_usage < 1.0


def test_totals_add_up() -> None:
    with LLM("random:tiny-llama", **OPTIONS, overlap=False, enable_prefix_caching=False) as llm:
        llm.generate([[5] * 20, [6] * 40], SamplingParams(max_tokens=7, ignore_eos=True))
        metrics = llm.engine.metrics
        assert metrics.num_requests == metrics.num_finished == 2
        assert metrics.num_prompt_tokens == 60
        assert metrics.num_output_tokens == 14
        assert metrics.num_batched_tokens == 60 + 2 * 6
        assert metrics.num_cached_tokens == metrics.num_preemptions == 0
        assert metrics.kv_usage == 0.0
        assert metrics.device_seconds > 0
        assert set(metrics.as_dict()) >= {"num_steps", "kv_usage", "num_waiting"}
