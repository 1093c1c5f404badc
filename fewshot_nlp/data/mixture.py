"""Tasks from many pools with unlike label sets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import isfinite
from typing import Any

from fewshot_nlp.data.encode import pools_by_address
from fewshot_nlp.data.pool import Pool
from fewshot_nlp.data.sampler import EpisodeSampler, EpisodeSequence, generator
from fewshot_nlp.types import EpisodeSpec


class EpisodeMixture(EpisodeSequence):
    """Each episode comes whole from one sampler, drawn by weight; ``mixture[i]`` is a pure function of (seed, i).

    ``mixture[i]`` is ``samplers[j][i]``, so a spec still says where to find it again.

    Args:
        samplers: one or more, over pools of the same split. Their label sets and settings may differ.
        weights: how often each is drawn, in proportion; equally often if not given.
        seed: of the draw among samplers; theirs is their own.
        num_episodes: end of the sequence; the shortest sampler's if not given.

    Raises:
        ValueError: no samplers, splits that differ, weights that do not fit, two different pools of one name, or a
            sampler shorter than ``num_episodes``.
    """

    def __init__(
        self,
        samplers: Sequence[EpisodeSampler],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        num_episodes: int | None = None,
    ) -> None:
        self.samplers = list(samplers)
        if not self.samplers:
            raise ValueError("A mixture needs one or more samplers.")
        splits = sorted({sampler.pool.split for sampler in self.samplers})
        if len(splits) > 1:
            raise ValueError(f"The samplers are of different splits: {', '.join(splits)}. Mix pools of one split.")
        self.weights = [1.0] * len(self.samplers) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(self.samplers):
            raise ValueError(f"{len(self.weights)} weights do not fit {len(self.samplers)} samplers. Give one each.")
        if not all(isfinite(weight) and weight >= 0 for weight in self.weights) or not sum(self.weights):
            raise ValueError(f"weights={self.weights} must be finite, not negative, and not all zero.")
        lengths = [sampler.num_episodes for sampler in self.samplers if sampler.num_episodes is not None]
        shortest = min(lengths, default=None)
        super().__init__(seed, shortest if num_episodes is None else num_episodes)
        if num_episodes is not None and shortest is not None and shortest < num_episodes:
            raise ValueError(
                f"num_episodes={num_episodes} is more than the {shortest} of a sampler. "
                f"Lower it, or leave the samplers endless."
            )
        self._pools = {name: pool for (name, _), pool in pools_by_address([s.pool for s in self.samplers]).items()}
        self._bounds = list(accumulate(self.weights))

    @property
    def pools(self) -> dict[str, Pool]:
        return self._pools

    @property
    def settings(self) -> dict[str, Any]:
        """What, with the pools, makes the sequence what it is."""
        samplers = [{"pool": sampler.pool.name, **sampler.settings} for sampler in self.samplers]
        return {"weights": self.weights, "seed": self.seed, "samplers": samplers}

    def _episode(self, index: int) -> EpisodeSpec:
        point = generator("mixture", self.seed, index).random() * self._bounds[-1]
        chosen = next(i for i, bound in enumerate(self._bounds) if point < bound)
        return self.samplers[chosen][index]
