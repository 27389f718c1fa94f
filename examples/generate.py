"""Several prompts in one batch, each with its own parameters."""

from minillm import LLM, SamplingParams

prompts = ["The capital of France is", "def fibonacci(n):", "The three primary colours are"]
params = [SamplingParams(max_tokens=16, temperature=t, seed=7) for t in (0.0, 0.0, 0.8)]

with LLM("smollm2") as llm:
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        print(f"{prompt!r} -> {output.text!r} ({output.finish_reason.value})")
