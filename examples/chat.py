"""Two turns of a chat: the second finds the first in the prefix cache."""

from minillm import LLM, SamplingParams

with LLM("smollm2") as llm:
    messages = []
    for question in ("Name a city in Italy, in one word.", "What is it known for, in one sentence?"):
        messages.append({"role": "user", "content": question})
        text = ""
        for chunk in llm.stream(messages, SamplingParams(max_tokens=32, temperature=0.0)):
            print(chunk.text, end="", flush=True)
            text += chunk.text
        messages.append({"role": "assistant", "content": text})
        timings = chunk.output.timings
        print(f"\n[{timings.num_prompt_tokens} prompt tokens, {timings.num_cached_tokens} of them cached]")
