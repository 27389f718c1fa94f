"""Which drafts hold. The target was sampled at each drafted position with that position's own noise, so keeping
drafts while they equal the samples leaves the output exactly as without drafts (Leviathan et al. 2023, for a
deterministic sampler). It knows no tensors."""

from __future__ import annotations

from collections.abc import Sequence


def verified(samples: Sequence[int], drafts: Sequence[int]) -> list[int]:
    """Tokens gained: samples[0], and samples[i + 1] for as long as drafts[i] equals samples[i].

    >>> verified([7, 8, 9], [7, 5])
    [7, 8]
    """
    assert len(samples) == len(drafts) + 1, "one sample per draft and one more"
    gained = [samples[0]]
    for draft, sample in zip(drafts, samples[1:], strict=True):
        if draft != gained[-1]:
            break
        gained.append(sample)
    return gained
