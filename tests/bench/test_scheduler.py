"""The scheduler's benchmark runs and ends with a JSON line; its times are for `minillm bench scheduler` to judge."""

from __future__ import annotations

import json

import pytest

from minillm.bench import scheduler


def test_it_ends_with_a_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    returned = scheduler.run(num_steps=8)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == returned and printed["bench"] == "scheduler"
    setups = [(t["num_rows"], t["num_in_flight"], t["recorded_steps"]) for t in printed["timings"]]
    assert setups == [(rows, flying, recorded) for rows in (256, 1024) for flying in (1, 2) for recorded in (0, 512)]
    assert all(t["mean_step_tokens"] > t["num_rows"] + 1000 for t in printed["timings"]), "no chunk rides along"
