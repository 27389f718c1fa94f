"""`minillm bench lossless`: drafts change no token, and what is sampled beside them has the model's own distribution.

First the same requests with drafts and without, greedy and sampled, token by token. Then many draws of two tokens, the
second of them at a position with a draft: their counts against the model's probabilities (Pearson's chi-square).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console

from minillm.bench.speculation_prompts import PROMPTS, asked
from minillm.config import NGRAM, EngineConfig
from minillm.core.request import Request
from minillm.decoding.controller import Fixed
from minillm.llm import LLM
from minillm.types import SamplingParams

__all__ = ["run"]

KINDS = {
    "greedy": SamplingParams(temperature=0.0),
    "sampled": SamplingParams(temperature=0.8, top_p=0.95),
}
TEXT = "The best thing about the sea is"
NUM_FIRST, NUM_SECOND = 4, 8
"""Likeliest first tokens, and second ones after each, that are counted by themselves."""
MIN_EXPECTED = 5.0


class Likeliest:
    """Drafts the likeliest token after each first one."""

    def __init__(self, after: Mapping[int, int]) -> None:
        self._after = after

    def has_guess(self, request: Request) -> bool:
        """It may always have."""
        return True

    def propose(self, wanted: Mapping[Request, int]) -> dict[Request, list[int]]:
        """One draft where the last token is known."""
        return {r: [self._after[r.tokens[-1]]] for r in wanted if r.tokens[-1] in self._after}

    def go_on(self) -> None:
        """All is known beforehand."""

    def forget(self, request: Request) -> None:
        """The request ended."""


def run(
    *, model: str = "smollm2", config: EngineConfig | None = None, max_tokens: int = 64, num_draws: int = 20_000
) -> dict[str, Any]:
    """Compare, draw, print, and end with a JSON line, which is also returned. Raises what loading the model raises.

    In float32 unless the config says otherwise: in 16 bits a token's logits depend, by their last bits, on the step
    that it is computed in, which is seen in this many draws and has nothing to do with drafts.
    """
    config = replace(config or EngineConfig(), recorded_steps=0)
    config = replace(config, dtype="float32") if config.dtype == "auto" else config
    on = config if config.speculative else replace(config, speculative=NGRAM)
    off = replace(on, speculative=None, num_drafts=None, draft_device=None)
    params = {
        kind: [replace(each, seed=i, max_tokens=max_tokens) for i in range(len(PROMPTS))]
        for kind, each in KINDS.items()
    }
    with LLM(model, **asdict(off)) as llm:
        expected = {kind: llm.generate(asked(llm), each) for kind, each in params.items()}
        probabilities, after = pair_probabilities(llm)
    line: dict[str, Any] = {"bench": "lossless", "model": model, "dtype": on.dtype, "speculative": on.speculative}
    with LLM(model, **asdict(on)) as llm:
        speculator = llm.engine.speculator
        assert speculator is not None
        speculator.policy = Fixed(on.max_drafts)
        for kind, each in params.items():
            outputs = llm.generate(asked(llm), each)
            same = [a.token_ids == b.token_ids for a, b in zip(outputs, expected[kind], strict=True)]
            line[kind] = {
                "num_prompts": len(same),
                "num_equal": sum(same),
                "num_drafts": sum(output.timings.num_drafts for output in outputs),
                "num_accepted": sum(output.timings.num_accepted_drafts for output in outputs),
            }
        speculator.drafter, speculator.policy = Likeliest(after), Fixed(1)
        line["distribution"] = draw(llm, probabilities, num_draws)
    print_line(line)
    return line


def pair_probabilities(llm: LLM) -> tuple[dict[tuple[int, int], float], dict[int, int]]:
    """Probabilities of the likeliest pairs of tokens after TEXT, and the likeliest token after each first one."""
    ids = llm.encode(TEXT)
    ask = SamplingParams(temperature=0.0, max_tokens=1, logprobs=NUM_SECOND, ignore_eos=True)

    def likeliest(prompt: list[int], num: int) -> list[tuple[int, float]]:
        scores = llm.generate([prompt], ask)[0].logprobs
        assert scores is not None
        ranked = sorted(scores[0].items(), key=lambda item: -item[1].logprob)
        return [(token, math.exp(score.logprob)) for token, score in ranked[:num]]

    probabilities: dict[tuple[int, int], float] = {}
    after: dict[int, int] = {}
    for first, share in likeliest(ids, NUM_FIRST):
        seconds = likeliest([*ids, first], NUM_SECOND)
        after[first] = seconds[0][0]
        probabilities |= {(first, second): share * rest for second, rest in seconds}
    return probabilities, after


def draw(llm: LLM, probabilities: Mapping[tuple[int, int], float], num_draws: int) -> dict[str, Any]:
    """Counts of pairs against what is expected; pairs that are too rare are one cell, with all others."""
    ids, counts = llm.encode(TEXT), Counter[tuple[int, int]]()
    num_drafts = num_accepted = 0
    size = max(1, llm.engine.scheduler.limits.max_num_seqs // 2)  # each with a draft
    for begin in range(0, num_draws, size):
        seeds = range(begin, min(begin + size, num_draws))
        params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=3, ignore_eos=True) for seed in seeds]
        for output in llm.generate([ids] * len(seeds), params):
            counts[output.token_ids[0], output.token_ids[1]] += 1
            num_drafts += output.timings.num_drafts
            num_accepted += output.timings.num_accepted_drafts
    cells = {pair: p * num_draws for pair, p in probabilities.items() if p * num_draws >= MIN_EXPECTED}
    observed = [*(counts[pair] for pair in cells), num_draws - sum(counts[pair] for pair in cells)]
    expected = [*cells.values(), num_draws - sum(cells.values())]
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    return {
        "num_draws": num_draws,
        "num_drafts": num_drafts,
        "num_accepted": num_accepted,
        "num_cells": len(expected),
        "chi_square": round(statistic, 3),
        "p_value": round(tail_probability(statistic, len(expected) - 1), 5),
    }


def tail_probability(statistic: float, num_degrees: int) -> float:
    """Chance that a chi-square variable of so many degrees of freedom is at least `statistic`.

    >>> round(tail_probability(3.841, 1), 3)
    0.05
    """
    halves = torch.tensor([num_degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


def print_line(line: dict[str, Any]) -> None:
    """The findings for people, then for programs."""
    console = Console()
    for kind in KINDS:
        each = line[kind]
        console.print(
            f"{kind}: {each['num_equal']} of {each['num_prompts']} outputs equal with and without drafts "
            f"({each['num_accepted']} of {each['num_drafts']} drafts held)"
        )
    found = line["distribution"]
    console.print(
        f"{found['num_draws']} draws, {found['num_accepted']} of {found['num_drafts']} drafts held: chi-square "
        f"{found['chi_square']} over {found['num_cells']} cells, p = {found['p_value']}"
    )
    print(json.dumps(line), flush=True)
