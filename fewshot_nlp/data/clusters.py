"""Finer classes than a data set's own: clusters of each class, after CACTUs (Hsu, Levine and Finn, ICLR 2019,
arXiv:1810.02334), which makes classes of clusters where there are no labels.

A few broad classes teach a metric to forget what differs within them, and new classes may differ in just that. k-means
divides each training class by the features of the untrained backbone, and training tasks are drawn among the clusters
of all classes: what is alike under the backbone, and of one class, is to stay together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.cluster import KMeans

from fewshot_nlp.checks import at_least
from fewshot_nlp.data.pool import Pool


def find_clusters(
    pool: Pool,
    features: Callable[[Sequence[Any]], np.ndarray],
    n_clusters: int,
    *,
    min_examples: int = 1,
    seed: int = 0,
) -> dict[str, tuple[int, ...]]:
    """Rows of each cluster of each class, by ``"<class>/<cluster>"``; what ``divide_classes`` takes.

    Args:
        pool: of training classes.
        features: ``[n, size]`` of n examples; under cosine, unit vectors.
        n_clusters: into which each class is divided, or fewer where it has not ``min_examples`` for each on average.
        min_examples: what an episode takes of a class. Smaller clusters are left out; a class that has not twice as
            many examples stays whole.
        seed: of k-means.

    Raises:
        ValueError: ``n_clusters`` or ``min_examples`` below 1.
    """
    at_least("n_clusters", n_clusters, 1)
    at_least("min_examples", min_examples, 1)
    found: dict[str, tuple[int, ...]] = {}
    for name, rows in pool.rows_by_class.items():
        points = features(pool.examples(rows))
        # k-means wants no more clusters than there are different points; rounding makes none different.
        different = len(np.unique(points.round(5), axis=0))
        count = min(n_clusters, max(len(rows) // min_examples, 1), different)
        labels = KMeans(count, n_init=4, random_state=seed).fit_predict(points)
        parts = [tuple(np.asarray(rows)[labels == i].tolist()) for i in range(count)]
        kept = [part for part in parts if len(part) >= min_examples or count == 1]
        found |= {f"{name}/{i}": part for i, part in enumerate(kept)}
    return found


def divide_classes(pool: Pool, clusters: Mapping[str, Sequence[int]]) -> Pool:
    """``pool`` with ``clusters`` for classes, each called what its class is called, in words.

    Two clusters of one class then have one name: it says which class an example is of, and the examples the rest.
    """
    parents = {name: name.rpartition("/")[0] for name in clusters}
    return replace(
        pool,
        # What is drawn from it is at no address of the first pool.
        name=f"{pool.name}-{len(clusters)}-clusters",
        rows_by_class={name: tuple(rows) for name, rows in clusters.items()},
        readable_names={name: pool.readable_name(parent) for name, parent in parents.items()},
        descriptions={name: pool.descriptions[own] for name, own in parents.items() if own in pool.descriptions},
    )
