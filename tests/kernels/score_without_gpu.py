"""Run by test_scores in a process of its own: scores kernels are compiled for an H100 that is not there, and launched.

Prints one JSON object: which kernels were compiled for the first request, and how many for all others.
"""

from __future__ import annotations

import json

import torch
from triton.runtime import driver

from minillm.kernels import scores
from minillm.kernels.compiling import compilations
from tests.kernels.compile_without_gpu import launched, stand_in


def main() -> None:
    driver.set_active(stand_in())
    counted = compilations()
    logits_LV = torch.zeros(40, 49152, dtype=torch.bfloat16)
    words = torch.zeros(100, dtype=torch.int32)
    nums = []
    for num_top in (1, 0, 2, 16, 20, 32, 1000):
        for begin, num_scored in ((0, 1), (0, 16), (1, 3), (3, 33)):  # within packed words: of any alignment
            rows_M = words[begin : begin + num_scored]
            scores.score_tokens(logits_LV, words[begin + 40 :], rows_M, num_top)
            nums.append(counted.num)
    print(json.dumps({"kernels": sorted(set(launched)), "first": nums[0], "in all": nums[-1]}))


if __name__ == "__main__":
    main()
