"""The engine against transformers on the real SmolLM2, in fp32: logits and 64 greedy tokens on 20 varied prompts.

One pass of transformers over prompt and output checks every greedy choice at once: if its best token after each prefix
is the engine's next token, then by induction its own greedy search gives the same output.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from minillm import LLM, SamplingParams
from tests.engine.forward import forward_logits

NUM_OUTPUT = 64
MAX_LOGIT_ERROR = 1e-3

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "import numpy as np\n\ndef softmax(x):\n",
    "人工智能的未来",
    "今天天气很好，我们去",
    "Question: What is 12 times 7?\nAnswer:",
    "SELECT name, COUNT(*) FROM users WHERE",
    "The three laws of thermodynamics are:\n1.",
    "Dear Sir or Madam,\n\nI am writing to",
    '{\n  "name": "Alice",\n  "age":',
    "# Recipe: Pancakes\n\n## Ingredients\n-",
    "To be, or not to be, that is",
    "é à ü ß ñ — naïve café",
    "🙂🙃 emoji are",
    "x",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "Translate to French: The cat sat on the mat.\n",
]


def long_text() -> str:
    """About 2,000 tokens that do not repeat."""
    return " ".join(
        f"On day {i} the crew sailed {i * 37 % 101} miles and counted {i * 53 % 89} birds." for i in range(110)
    )


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("smollm2", dtype="float32", device="cpu", max_model_len=2400) as engine:
        yield engine


def test_greedy_tokens_and_logits_equal_transformers(llm: LLM, smollm2_oracle: torch.nn.Module) -> None:
    prompts = [llm.encode(text) for text in [*PROMPTS, long_text()]]
    assert len(prompts) == 20
    assert 1900 < len(prompts[-1]) < 2300
    params = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT, ignore_eos=True)
    errors = []
    for prompt, out in zip(prompts, llm.generate(prompts, params), strict=True):
        ids = prompt + out.token_ids
        with torch.inference_mode():
            theirs = smollm2_oracle(torch.tensor([ids])).logits[0]
        ours = forward_logits(llm, ids)
        errors.append(float((ours - theirs).abs().max()))
        assert theirs[len(prompt) - 1 : -1].argmax(-1).tolist() == out.token_ids
    assert max(errors) < MAX_LOGIT_ERROR
