"""What a result was measured on: enough to tell whether two numbers may stand side by side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fewshot_nlp.data import EpisodeMixture, EpisodeSampler, Pool, episodes_hash


def split_hash(label_names: Mapping[str, Sequence[str]]) -> str:
    """Hash of which classes are in which split, ``{"train": [...], ...}``; the order of classes does not matter."""
    form = json.dumps({split: sorted(names) for split, names in label_names.items()}, sort_keys=True)
    return hashlib.sha256(form.encode()).hexdigest()[:16]


def leakage(pools: Sequence[Pool]) -> dict[str, int]:
    """How many examples of ``pools`` another split, that is evaluated, holds too: left out, and kept all the same."""
    own = {id(pool): pool for pool in pools}.values()
    return {"dropped": sum(pool.num_dropped for pool in own), "kept": sum(pool.num_shared for pool in own)}


def build_protocol(
    pools: Mapping[str, Pool],
    *,
    n_way: int,
    shots: Sequence[int],
    n_query: int,
    n_out_of_scope: int = 0,
    episodes: int,
    seed: int,
    transductive: bool,
    uses_label_names: bool = False,
    split: str = "test",
    samplers: Mapping[str, EpisodeSampler | EpisodeMixture] | None = None,
    baselines: Mapping[str, Mapping[str, Any]] | None = None,
    training: Mapping[str, Pool] | None = None,
    unlabelled: Pool | None = None,
) -> dict[str, Any]:
    """The ``"protocol"`` entry of ``results.json``.

    Args:
        pools: the data set's splits by name; the results are on ``pools[split]``.
        n_way, shots, n_query: classes an episode, support examples a class (one run each), queries a class.
        n_out_of_scope: further queries an episode, of other classes; their number changes which examples are drawn.
        episodes: episodes of each run.
        seed: seed of the episodes' sampler.
        transductive: whether the answer to one query may depend on the other queries beside it.
        uses_label_names: whether the names of the classes are support examples, too, for the learner and baselines.
        split: where the episodes come from.
        samplers: what draws the episodes of each run, such as ``{"1-shot": sampler}``, to record their hashes; with
            ``num_episodes`` set, ``save_episodes`` writes the list of that hash.
        baselines: settings of baselines that have any, by name.
        training: what training tasks are drawn from, if not from ``pools`` alone.
        unlabelled: what texts beside them are drawn from, if any.
    """
    pool = pools[split]
    learned = training or {name: each for name, each in pools.items() if name == "train"}
    return {
        "dataset": pool.name,
        "dataset_config_name": pool.config_name,
        "hub_id": pool.hub_id,
        "split": split,
        "leakage": leakage([*pools.values(), *(training or {}).values()]),
        "split_hash": split_hash({name: each.label_names for name, each in pools.items()}),
        "pool_fingerprint": pool.fingerprint,
        "classes": list(pool.label_names),
        "n_way": n_way,
        "shots": list(shots),
        "n_query": n_query,
        "n_out_of_scope": n_out_of_scope,
        "episodes": episodes,
        "seed": seed,
        "episodes_hash": {
            name: episodes_hash([sampler[i] for i in range(episodes)], sampler, sampler.settings)
            for name, sampler in (samplers or {}).items()
        },
        "transductive": transductive,
        "uses_label_names": uses_label_names,
        "baselines": {name: dict(settings) for name, settings in (baselines or {}).items()},
        "trained_on": [_named(each) for each in learned.values()],
        "unlabelled": [_named(unlabelled)] if unlabelled else [],
        "interval": "95 %, Student t over episodes",
    }


def _named(pool: Pool) -> dict[str, Any]:
    return {"dataset": pool.name, "dataset_config_name": pool.config_name}
