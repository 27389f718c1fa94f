"""The benchmarks of speculation run, and the check that it is lossless finds a drafter that is not."""

from __future__ import annotations

import json

import pytest
import torch

from minillm.bench import lossless, speculation
from minillm.bench.speculation_prompts import PROMPTS
from minillm.config import EngineConfig
from minillm.runtime import runner
from tests.engine.checkpoints import write_word_tokenizer

CONFIG = EngineConfig(device="cpu", dtype="float32", num_kv_blocks=1500, max_num_seqs=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model whose choices are few, so that it repeats itself and few draws say much."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shape = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        initializer_range=0.4,
        eos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("peaked")
    LlamaForCausalLM(shape).save_pretrained(folder)
    write_word_tokenizer(folder, shape.vocab_size)
    return str(folder)


def test_ten_prompts() -> None:
    assert len(set(PROMPTS)) == 10 and all(300 < len(text) < 1000 for text in PROMPTS)


def test_both_engines_are_measured(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = speculation.run(model=model, config=CONFIG, batch_sizes=(1, 12), max_tokens=24, repeats=1)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line
    assert [row["batch_size"] for row in line["results"]] == [1, 12]
    assert all(row["plain_tok_s"] > 0 and row["drafting_tok_s"] > 0 for row in line["results"])
    assert all(row["share_of_equal_outputs"] == 1.0 and row["speedup"] > 0 for row in line["results"])


def test_drafts_are_lossless(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = lossless.run(model=model, config=CONFIG, max_tokens=64, num_draws=600)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == line
    for kind in ("greedy", "sampled"):
        assert line[kind]["num_equal"] == 10 and line[kind]["num_drafts"] > 0
    assert line["distribution"]["num_drafts"] > 50 and line["distribution"]["p_value"] > 1e-4


def test_a_biased_rule_is_found(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Drafts kept whatever the samples are: outputs differ, and the likeliest token comes too often."""

    def credulous(samples: list[int], drafts: list[int]) -> list[int]:
        return [*drafts, samples[-1]]

    monkeypatch.setattr(runner, "verified", credulous)
    line = lossless.run(model=model, config=CONFIG, max_tokens=64, num_draws=600)
    assert line["greedy"]["num_equal"] < 10 and line["sampled"]["num_equal"] < 10
    assert line["distribution"]["p_value"] < 1e-6
