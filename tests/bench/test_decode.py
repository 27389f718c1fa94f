"""The decode benchmark runs and ends with a JSON line; its times are for `minillm bench decode` to judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minillm.bench import decode
from minillm.bench.yardstick import Yardstick
from minillm.classic import Configs, MiniLLM, ModelConfig
from minillm.errors import ConfigError


def tiny() -> ModelConfig:
    return ModelConfig(vocab_size=99, hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model and machine rates of no meaning."""
    monkeypatch.setattr(Configs, "small", staticmethod(tiny))
    monkeypatch.setattr(decode, "measure_yardstick", lambda device, dtype: Yardstick(1e9, 1e9, "float32"))
    monkeypatch.setattr(decode, "NUM_NEW_TOKENS", 3)


def test_it_prints_tables_a_picture_and_one_json_line(capsys, tmp_path: Path) -> None:
    picture = tmp_path / "decode.png"
    returned = decode.run(max_context=300, picture=picture)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == returned and returned["bench"] == "decode"
    assert [row["context"] for row in returned["tokens"]] == [64, 128, 256]
    assert [row["sequences"] for row in returned["rates"]] == [1, 16]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_with_a_cache_one_token_is_computed_and_without_all(monkeypatch) -> None:
    computed = []
    plain = MiniLLM.last_logits

    def watched(self, sequences, cache, *given):
        computed.append((cache.lengths[0], len(sequences[0])))
        return plain(self, sequences, cache, *given)

    monkeypatch.setattr(MiniLLM, "last_logits", watched)
    monkeypatch.setattr(decode, "REPEATS", 1)
    decode.token_row(MiniLLM(tiny()), 40, 1.0)
    assert computed == [(0, 40), (40, 1)] * 2 + [(0, 41)] * 2


def test_a_rate_counts_the_tokens_of_all_sequences(monkeypatch) -> None:
    timing = {"tokens_per_second": 7.0, "decode_time": 2.0}
    monkeypatch.setattr(decode, "generate_tokens", lambda model, prompts, config: ([], timing))
    row = decode.rate_row(MiniLLM(tiny()), 16)
    assert (row["tokens_per_second"], row["decode_tokens_per_second"]) == (7.0, 16 * 2 / 2.0)


def test_bad_options_are_named() -> None:
    with pytest.raises(ConfigError, match="max_context must be an integer from 64"):
        decode.run(max_context=1)
