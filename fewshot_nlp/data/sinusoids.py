"""The sinusoids of MAML (Finn, Abbeel and Levine, ICML 2017, arXiv:1703.03400, section 5.1): few-shot regression that
needs no data set.

A task is ``y = a sin(x - p)``, with amplitude ``a`` from [0.1, 5] and phase ``p`` from [0, π], both uniform; examples
are points ``x`` from [-5, 5], uniform, without noise. What a task is stands in its address: ``EpisodeSpec.classes``
holds amplitude and phase in words, and rows are points of a grid of 2^20 steps over the interval.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from fewshot_nlp.checks import at_least, choice
from fewshot_nlp.data.sampler import EpisodeSequence, below, generator
from fewshot_nlp.types import Batch, Episode, EpisodeSpec

AMPLITUDES, PHASES, INTERVAL = (0.1, 5.0), (0.0, math.pi), (-5.0, 5.0)
POOL = "sinusoids"
SPLITS = ("train", "validation", "test")
_GRID = 2**20
_NUMBER = r"(\d+\.\d+)"
_NAME = re.compile(f"amplitude {_NUMBER}, phase {_NUMBER}")


class SinusoidSampler(EpisodeSequence):
    """Sinusoids by index: ``sampler[i]`` is a pure function of (seed, split, i), and ``read_sinusoid`` reads it.

    Args:
        split: tasks of different splits are different draws from one distribution.
        k_shot: support points.
        n_query: query points.
        seed: of the sequence.
        num_episodes: end of the sequence; endless if not given.
    """

    def __init__(
        self, split: str = "train", *, k_shot: int = 10, n_query: int = 10, seed: int = 0,
        num_episodes: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(seed, num_episodes)
        choice("split", split, SPLITS)
        at_least("k_shot", k_shot, 1)
        at_least("n_query", n_query, 1)
        self.split, self.k_shot, self.n_query = split, k_shot, n_query

    @property
    def settings(self) -> dict[str, Any]:
        """What makes the sequence what it is."""
        return {name: getattr(self, name) for name in ("split", "k_shot", "n_query", "seed")}

    def _episode(self, index: int) -> EpisodeSpec:
        rng = generator(POOL, self.seed, self.split, index)
        amplitude, phase = (low + rng.random() * (high - low) for low, high in (AMPLITUDES, PHASES))
        rows = [below(rng, _GRID) for _ in range(self.k_shot + self.n_query)]
        return EpisodeSpec(
            split=self.split,
            index=index,
            pool=POOL,
            classes=(f"amplitude {amplitude:.6f}, phase {phase:.6f}",),
            support=(tuple(rows[: self.k_shot]),),
            query=(tuple(rows[self.k_shot :]),),
        )


def sinusoid(spec: EpisodeSpec) -> tuple[float, float]:
    """Amplitude and phase of a task.

    Raises:
        ValueError: the spec is no sinusoid's.
    """
    found = _NAME.fullmatch(spec.classes[0]) if len(spec.classes) == 1 else None
    if spec.pool != POOL or found is None:
        raise ValueError(f"The episode {spec.address} is no sinusoid. Draw it from a SinusoidSampler.")
    return float(found[1]), float(found[2])


def read_sinusoid(spec: EpisodeSpec) -> Episode:
    """The points of a task: inputs ``values`` ``[n, 1]`` and labels ``[n]``, both float32.

    Raises:
        ValueError: the spec is no sinusoid's.
    """
    amplitude, phase = sinusoid(spec)

    def batch(rows: Sequence[int]) -> Batch:
        low, high = INTERVAL
        x = low + (high - low) * torch.tensor(rows, dtype=torch.float64) / _GRID
        return Batch({"values": x[:, None].float()}, (amplitude * torch.sin(x - phase)).float(), 1)

    return Episode(spec, batch(spec.support[0]), batch(spec.query[0]))
