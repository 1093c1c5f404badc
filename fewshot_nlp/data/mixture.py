"""Tasks from many pools with unlike label sets."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from math import isfinite
from typing import Any

from fewshot_nlp.data.config import EpisodeConfig
from fewshot_nlp.data.encode import pools_by_address
from fewshot_nlp.data.leakage import class_key
from fewshot_nlp.data.pool import Pool, load_pools_from_config
from fewshot_nlp.data.sampler import EpisodeSampler, EpisodeSequence, generator
from fewshot_nlp.data.splits import TooFewClasses
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


def training_tasks_from_config(
    config: EpisodeConfig, pools: Mapping[str, Pool], seed: int = 0
) -> EpisodeSampler | EpisodeMixture:
    """Training episodes of ``pools``, or of them and the data sets of ``config.mixture_dataset_names``.

    Args:
        config: where tasks come from, and their shape.
        pools: those of ``config.dataset_name``.
        seed: of the episodes.

    Raises:
        ValueError, FileNotFoundError, ImportError: as ``training_pools_from_config``; or a pool cannot fill such
            episodes.
    """
    return training_tasks(config, training_pools_from_config(config, pools), seed)


def training_tasks(config: EpisodeConfig, training: Sequence[Pool], seed: int = 0) -> EpisodeSampler | EpisodeMixture:
    """Training episodes of ``training``, whose pools stand for those of ``training_pools_from_config``."""
    shape = ("n_way", "k_shot", "n_query", "max_n_way", "max_k_shot", "n_out_of_scope")
    options = {name: getattr(config, name) for name in shape}
    for pool in training if config.mixture_dataset_names else ():
        _check_classes(config, pool)
    samplers = [EpisodeSampler(pool, **options, seed=seed) for pool in training]
    weights = [weight for weight in config.mixture_weights or [1.0] * len(samplers) if weight]
    return samplers[0] if len(samplers) == 1 else EpisodeMixture(samplers, weights, seed)


def _check_classes(config: EpisodeConfig, pool: Pool) -> None:
    """Raise ``ValueError`` where one of several pools has too few classes for an episode: others may have enough."""
    count, n_way = len(pool.label_names), config.largest[0]
    if count < n_way:
        limit = "max_n_way" if config.max_n_way else "n_way"
        raise ValueError(
            f"mixture_dataset_names: {pool.name!r} has {count} training classes, fewer than {limit}={n_way}. Lower "
            f"{limit}, divide its classes by a higher clusters_per_class, or leave it out (of dataset_name: give 0 as "
            f"its weight in mixture_weights)."
        )


def evaluation_tasks(config: EpisodeConfig, pool: Pool, k_shot: int, seed: int = 0) -> EpisodeSampler:
    """Episodes of ``pool`` as ``config`` evaluates them; ``ValueError`` where it cannot fill such."""
    called = {"k_shot": "eval_k_shots", "n_query": "eval_n_query", "n_out_of_scope": "eval_n_out_of_scope"}
    return EpisodeSampler(
        pool,
        n_way=config.eval_n_way or config.n_way,
        k_shot=k_shot,
        n_query=config.eval_n_query,
        n_out_of_scope=config.eval_n_out_of_scope,
        seed=seed,
        called=called | ({"n_way": "eval_n_way"} if config.eval_n_way else {}),
    )


def training_pools_from_config(config: EpisodeConfig, pools: Mapping[str, Pool]) -> list[Pool]:
    """The pools that training tasks come from: that of ``pools``, and of ``config.mixture_dataset_names``.

    What is evaluated, the validation and test classes of ``pools``, is not learned from the mixture: neither its texts
    nor classes of the same name, up to spelling, unless ``config.duplicates`` says so. Classes called by a number have
    no name to compare.

    Raises:
        ValueError, FileNotFoundError, ImportError: a data set that cannot be read, has no training classes, or shares
            texts or classes with the evaluation.
    """
    names = [config.dataset_name, *(config.mixture_dataset_names or ())]
    weights = config.mixture_weights or [1.0] * len(names)
    training: list[Pool] = []
    for i, name in enumerate(names):
        # Without a weight the first data set is there to be evaluated on alone.
        if not weights[i]:
            continue
        found = pools if i == 0 else _opened(config, name)
        if "train" not in found:
            raise ValueError(f"The data set {name!r} has no training classes, only {', '.join(found)}. Give it some.")
        pool = found["train"]
        if i > 0:
            # What it shares with splits of its own counts for nothing: those are not evaluated.
            pool = _not_evaluated(replace(pool, num_dropped=0, num_shared=0), pools, config)
            pool = replace(pool, name=_name_apart(pool, {other.name for other in (*pools.values(), *training)}, i + 1))
        training.append(pool)
    return training


def _name_apart(pool: Pool, taken: Collection[str], number: int) -> str:
    """The name of ``pool``, or one by its configuration or number: files in different folders may have one name, and
    languages of one data set do."""
    names = [pool.name, f"{pool.name}-{pool.config_name or number}", f"{pool.name}-{number}"]
    return next((name for name in names if name not in taken), names[-1])


def _opened(config: EpisodeConfig, name: str) -> dict[str, Pool]:
    """A data set of the mixture, with the settings that are for all of them; its training classes are all that it has
    where it has too few for three splits, and none of its own: nothing is evaluated on it."""
    own = replace(
        config, dataset_name=name, dataset_config_name=None, dataset_revision=None, split_file=None,
        mixture_dataset_names=None, mixture_weights=None, n_unlabelled=0,
    )  # fmt: skip
    try:
        try:
            return load_pools_from_config(own)
        except TooFewClasses:
            return load_pools_from_config(own, split_fractions=(1, 0, 0))
    except ValueError as error:
        raise ValueError(f"mixture_dataset_names: {name!r}: {error}") from error


def _not_evaluated(pool: Pool, pools: Mapping[str, Pool], config: EpisodeConfig) -> Pool:
    """``pool`` without what is evaluated in ``pools``, or as ``config.duplicates`` says."""
    evaluated = [each for split, each in pools.items() if split != "train"]
    # Classes called by a number have no name to compare.
    classes = {class_key(name) for each in evaluated for name in each.label_names if not name.isdecimal()}
    keys = {key for each in evaluated for rows in each.rows_by_class.values() for key in each.keys(rows)}
    kept: dict[str, tuple[int, ...]] = {}
    shared, count = [], 0
    for name, rows in pool.rows_by_class.items():
        same = class_key(name) in classes
        left = () if same else tuple(row for row, key in zip(rows, pool.keys(rows), strict=True) if key not in keys)
        count += len(rows) - len(left)
        if same:
            shared.append(f"the class {name!r}")
        elif len(left) < len(rows):
            shared.append(f"{'an image' if pool.kind == 'image' else 'a text'} of {name!r}")
        if left and len(left) >= config.min_examples:
            kept[name] = left
    if not shared:
        return pool
    if config.duplicates == "keep":
        return replace(pool, num_shared=count)
    if config.duplicates == "error":
        more = f" and {len(shared) - 3} more" if len(shared) > 3 else ""
        raise ValueError(
            f"mixture_dataset_names: {pool.name!r} would train on what is evaluated: {', '.join(shared[:3])}{more}. "
            f"Use duplicates='drop' to leave that out of the mixture, or duplicates='keep'."
        )
    if not kept:
        raise ValueError(
            f"mixture_dataset_names: {pool.name!r} has no class left with min_examples={config.min_examples} examples "
            f"that are not evaluated on. Leave it out."
        )
    return replace(pool, rows_by_class=kept, num_dropped=len(pool) - sum(map(len, kept.values())))
