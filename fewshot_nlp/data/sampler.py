"""Episodes as addresses: which classes, which rows. Nothing is read or encoded here."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fewshot_nlp.checks import at_least
from fewshot_nlp.data.pool import Pool
from fewshot_nlp.types import EpisodeSpec


class EpisodeSequence(ABC):
    """Episodes by index, from 0 to ``num_episodes``, or without end where that is ``None``."""

    def __init__(self, seed: int, num_episodes: int | None) -> None:
        if type(seed) is not int:
            raise ValueError(f"seed={seed!r} must be of type int, not {type(seed).__name__}.")
        if num_episodes is not None:
            at_least("num_episodes", num_episodes, 1)
        self.seed, self.num_episodes = seed, num_episodes

    @abstractmethod
    def _episode(self, index: int) -> EpisodeSpec:
        """The episode at ``index``, which is inside the sequence."""

    def at(self, address: str) -> EpisodeSpec:
        """The episode of an ``address`` such as ``"home_intents/train/17"``, to replay what a warning names.

        Raises:
            ValueError: there is none of that address in this sequence.
        """
        *_, index = address.rpartition("/")
        if index.isdecimal() and (spec := self[int(index)]).address == address:
            return spec
        raise ValueError(
            f"There is no episode {address!r} in this {type(self).__name__}, whose first is {self[0].address!r}. Use "
            f"the sampler that the run was trained with, with its seed."
        )

    def __len__(self) -> int:
        if self.num_episodes is None:
            raise TypeError(f"This {type(self).__name__} is endless. Set num_episodes to give it a length.")
        return self.num_episodes

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[EpisodeSpec]:
        index = 0
        while self.num_episodes is None or index < self.num_episodes:
            yield self[index]
            index += 1

    def __getitem__(self, index: int) -> EpisodeSpec:
        if index < 0 or (self.num_episodes is not None and index >= self.num_episodes):
            raise IndexError(
                f"Episode {index} is outside the sequence of {self.num_episodes or 'endless'} episodes from 0 on."
            )
        return self._episode(index)


class EpisodeSampler(EpisodeSequence):
    """An endless sequence of N-way K-shot episodes; ``sampler[i]`` is a pure function of (seed, split, i).

    No state, no global generator: any process can ask for any episode in any order. Same pool, settings and address
    give the same episode on every machine and Python version.

    Args:
        pool: where classes and rows come from.
        n_way: classes in an episode; 1, the group of texts, where the pool has targets.
        k_shot: support examples a class; with none, a task is told by the names of its classes alone.
        n_query: query examples a class.
        seed: of the sequence.
        max_n_way: draw the way of each episode from ``n_way`` up to this.
        max_k_shot: draw the shot of each episode from ``k_shot`` up to this.
        n_out_of_scope: further queries of classes outside the episode, spread evenly over the classes drawn for them.
        num_episodes: end of the sequence; endless if not given.
        called: what errors call these arguments, where the user knows them by other names.

    Raises:
        ValueError: the pool cannot fill such episodes.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        n_way: int,
        k_shot: int,
        n_query: int,
        seed: int = 0,
        max_n_way: int | None = None,
        max_k_shot: int | None = None,
        n_out_of_scope: int = 0,
        num_episodes: int | None = None,
        called: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(seed, num_episodes)
        self.pool = pool
        self.n_way, self.max_n_way = n_way, n_way if max_n_way is None else max_n_way
        self.k_shot, self.max_k_shot = k_shot, k_shot if max_k_shot is None else max_k_shot
        self.n_query, self.n_out_of_scope = n_query, n_out_of_scope
        self._check(called or {})
        self._classes = pool.label_names

    @property
    def pools(self) -> dict[str, Pool]:
        return {self.pool.name: self.pool}

    @property
    def settings(self) -> dict[str, Any]:
        """What, with the pool, makes the sequence what it is."""
        names = ("n_way", "max_n_way", "k_shot", "max_k_shot", "n_query", "n_out_of_scope", "seed")
        return {name: getattr(self, name) for name in names}

    def _episode(self, index: int) -> EpisodeSpec:
        rng = generator(self.seed, self.pool.split, index)
        n_way = self.n_way + below(rng, self.max_n_way - self.n_way + 1)
        k_shot = self.k_shot + below(rng, self.max_k_shot - self.k_shot + 1)
        outside = self.n_out_of_scope and len(self._classes) - n_way
        order = draw(rng, self._classes, n_way + min(outside, self.n_out_of_scope))
        classes, others = order[:n_way], order[n_way:]
        rows = [draw(rng, self.pool.rows_by_class[name], k_shot + self.n_query) for name in classes]
        out_of_scope: list[int] = []
        for i, name in enumerate(others):
            # The first classes give one query more where the number does not divide evenly.
            share = len(range(i, self.n_out_of_scope, len(others)))
            out_of_scope += draw(rng, self.pool.rows_by_class[name], share)
        return EpisodeSpec(
            split=self.pool.split,
            index=index,
            pool=self.pool.name,
            classes=tuple(classes),
            support=tuple(tuple(r[:k_shot]) for r in rows),
            query=tuple(tuple(r[k_shot:]) for r in rows),
            out_of_scope=tuple(out_of_scope),
        )

    def _check(self, called: Mapping[str, str]) -> None:
        if self.pool.target_column_name is None:
            at_least("n_way", self.n_way, 2)
        elif self.n_way != 1 or self.n_out_of_scope:
            raise ValueError(
                f"A task of the pool {self.pool.name!r}, which has targets, is one group of texts: n_way={self.n_way}, "
                f"n_out_of_scope={self.n_out_of_scope} mean nothing there. Use n_way=1, n_out_of_scope=0."
            )
        at_least("max_n_way", self.max_n_way, self.n_way)
        at_least("k_shot", self.k_shot, 0)
        at_least("max_k_shot", self.max_k_shot, self.k_shot)
        at_least("n_query", self.n_query, 1)
        at_least("n_out_of_scope", self.n_out_of_scope, 0)
        where = f"The {self.pool.split} pool of {self.pool.name!r}"
        counts = {name: len(rows) for name, rows in self.pool.rows_by_class.items()}
        limit = called.get("n_way", "n_way") if self.max_n_way == self.n_way else "max_n_way"
        k_shot, n_query, outer = (called.get(name, name) for name in ("k_shot", "n_query", "n_out_of_scope"))
        if len(counts) < self.max_n_way:
            raise ValueError(
                f"{where} has {len(counts)} classes, fewer than {limit}={self.max_n_way}. "
                f"Lower {limit}, or give the split more classes."
            )
        need = self.max_k_shot + self.n_query
        small = {name: count for name, count in counts.items() if count < need}
        if small:
            name = min(small, key=lambda name: (small[name], name))
            raise ValueError(
                f"{where} has {len(small)} classes with too few examples: {name!r} has {small[name]}, and {need} are "
                f"needed ({k_shot}={self.max_k_shot} + {n_query}={self.n_query}). Lower {k_shot} or {n_query}, or "
                f"leave such classes out, with min_examples={need}."
            )
        if self.n_out_of_scope:
            outside = len(counts) - self.max_n_way
            if outside < 1:
                raise ValueError(
                    f"{where} has {len(counts)} classes, so none is outside a {self.max_n_way}-way episode for "
                    f"{outer}={self.n_out_of_scope}. Lower {limit}, or set {outer}=0."
                )
            share = -(-self.n_out_of_scope // outside)
            if share > min(counts.values()):
                raise ValueError(
                    f"{where} cannot give {outer}={self.n_out_of_scope} queries: that may take {share} from one "
                    f"class, and the smallest has {min(counts.values())}. Lower {outer}."
                )


def generator(*address: object) -> random.Random:
    """A generator that depends on ``address`` alone.

    Text seeds are hashed with SHA-512, so nearby addresses are unrelated and PYTHONHASHSEED plays no part. Only
    ``random()`` may be used: Python keeps its sequence over versions, which it does not promise of ``sample``.
    """
    return random.Random("/".join(map(str, address)))


def below(rng: random.Random, end: int) -> int:
    """An int in ``[0, end)``."""
    return int(rng.random() * end)


def draw(rng: random.Random, items: Sequence[Any], count: int) -> list[Any]:
    """``count`` different items in random order: a Fisher-Yates shuffle that stops early and copies nothing."""
    moved: dict[int, int] = {}
    drawn = []
    for i in range(count):
        j = i + below(rng, len(items) - i)
        drawn.append(items[moved.get(j, j)])
        moved[j] = moved.get(i, i)
    return drawn
