"""The real model: SmolLM2 from its GGUF file against transformers reading the same file."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from minillm.config import Configs
from minillm.kernels import cpu, reference
from minillm.model.sources import load_config, load_weights, resolve
from minillm.model.transformer import Transformer
from minillm.text.loading import load_tokenizer
from tests.model.paged import PagedRun

TEXTS = [
    "The capital of France is Paris, and the capital of Italy is",
    "人工智能 is AI. def f(x):\n    return x ** 2  # 🙂\n",
]


@pytest.mark.parametrize("ops", [reference, cpu], ids=["reference", "cpu"])
def test_logits_equal_transformers(smollm2: Path, smollm2_oracle: Any, ops: ModuleType) -> None:
    files = resolve(str(smollm2))
    model = Transformer(load_config(files), ops=ops, dtype=torch.float32, device="cpu")
    load_weights(model, files)
    sequences = [load_tokenizer(files).encode(text) for text in TEXTS]
    steps = [(5, 1), (1, 7), *((len(sequences[0]) - 6, len(sequences[1]) - 8),)]
    for sequence, logits in zip(sequences, PagedRun(model, sequences).run(steps), strict=True):
        with torch.no_grad():
            expected = smollm2_oracle(torch.tensor([sequence])).logits[0]
        assert (logits - expected).abs().max() <= 1e-3


def test_shape_is_the_preset(smollm2: Path) -> None:
    from dataclasses import replace

    config = load_config(resolve(str(smollm2)))
    assert replace(config, eos_token_ids=(), bos_token_id=None, rms_norm_eps=1e-5) == Configs.SMOLLM2_135M
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert config.eos_token_ids == (2,)
