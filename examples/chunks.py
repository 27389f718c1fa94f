"""A long prompt beside short ones: its chunks share steps with their tokens. Random weights, nothing to download."""

from minillm import LLM, SamplingParams

prompts = [list(range(1, 9)), list(range(9, 17)), [5] * 1000]

with LLM("random:tiny-llama", max_num_batched_tokens=128, enable_prefix_caching=False) as llm:
    outputs = llm.generate(prompts, SamplingParams(max_tokens=32, ignore_eos=True))
    for output in outputs:
        timings = output.timings
        print(
            f"{timings.num_prompt_tokens:5} prompt tokens in {timings.num_chunks} chunks, {len(output.token_ids)} out"
        )
    print(f"{llm.engine.metrics.num_steps} steps for {llm.engine.metrics.num_batched_tokens} tokens")
