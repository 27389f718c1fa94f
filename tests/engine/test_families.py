"""Greedy tokens of every family of models equal those of transformers, through a checkpoint folder on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minillm import LLM, SamplingParams
from tests.engine.checkpoints import write_word_tokenizer
from tests.model.conftest import FAMILIES, SHAPE, make_hf_model


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    theirs = make_hf_model(family)
    theirs.save_pretrained(tmp_path)
    write_word_tokenizer(tmp_path, SHAPE["vocab_size"])
    prompts = [[5 + (i * 7 + n) % 150 for i in range(n)] for n in (3, 40, 90)]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    options = {"device": "cpu", "dtype": "float32", "num_kv_blocks": 64, "max_num_batched_tokens": 32}
    with LLM(str(tmp_path), **options) as llm:
        outputs = llm.generate(prompts, params)
    for prompt, out in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = theirs(torch.tensor([prompt + out.token_ids])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == out.token_ids
