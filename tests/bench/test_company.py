"""The benchmark of demanding rows runs every kind that a model takes and ends with a JSON line."""

from __future__ import annotations

import json

import pytest

from minillm.bench import company
from minillm.config import EngineConfig

OPTIONS = {
    "device": "cpu",
    "dtype": "float32",
    "num_kv_blocks": 60,
    "max_model_len": 64,
    "enable_prefix_caching": False,
}


@pytest.mark.parametrize(("model", "num_kinds"), [("random:tiny-llama", 5), ("smollm2", 7)])
def test_it_ends_with_a_json_line(capsys: pytest.CaptureFixture[str], model: str, num_kinds: int) -> None:
    config = EngineConfig(**OPTIONS)
    returned = company.run(model=model, config=config, num_rows=3, input_len=5, output_len=4, repeats=1)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == returned and printed["bench"] == "company"
    assert [row["row"] for row in printed["results"]] == ["plain", *list(company.KINDS)][:num_kinds]
    assert all(row["output_tok_s"] > 0 and row["of_plain"] > 0 for row in printed["results"])
