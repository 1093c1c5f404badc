"""Grouping texts by length, so that little arithmetic is spent on padding."""

from __future__ import annotations

import torch
from torch import Tensor

#: What one more call of the backbone costs, in tokens of one text.
CALL_COST = 40


def length_buckets(attention_mask: Tensor, shortest: int | None = None) -> list[tuple[Tensor, int]]:
    """Split a right-padded batch where that saves more tokens than a further call costs.

    Args:
        attention_mask: ``[n, length]``, 1 for real tokens.
        shortest: texts of one length share a bucket, and those of at most so many tokens; by default, and without
            padding in mind, whatever is cheapest.

    Returns:
        ``(rows, longest)`` of each bucket: indices into the batch, and the length that holds them all.
    """
    places = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    lengths = (attention_mask * places).amax(dim=1)
    order = lengths.argsort(stable=True)
    ascending = lengths[order].tolist()
    if shortest is None:
        starts = _cuts(ascending, 0, len(ascending))
    else:
        ascending = [max(length, shortest) for length in ascending]
        starts = [i for i, length in enumerate(ascending) if i == 0 or length != ascending[i - 1]]
    ends = [*starts[1:], len(ascending)]
    return [(order[a:b], ascending[b - 1]) for a, b in zip(starts, ends, strict=True)]


def _cuts(ascending: list[int], start: int, end: int) -> list[int]:
    """Where the buckets of ``ascending[start:end]`` begin: the best cut in two, again and again while it pays."""
    longest = ascending[end - 1]
    savings = [((cut - start) * (longest - ascending[cut - 1]), cut) for cut in range(start + 1, end)]
    saved, cut = max(savings, default=(0, end))
    if saved <= CALL_COST:
        return [start]
    return _cuts(ascending, start, cut) + _cuts(ascending, cut, end)
