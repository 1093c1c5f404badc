"""Randomness that belongs to an address and not to a process, so that there is no generator state to save."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(device: torch.device, *address: int) -> Iterator[None]:
    """Seed torch's generators from ``address`` inside the block, and put them back as they were after it."""
    digest = hashlib.sha256(repr(address).encode()).digest()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield
