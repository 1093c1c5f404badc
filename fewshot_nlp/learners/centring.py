"""Features around their mean, and of unit length: SimpleShot's "CL2N", Wang et al. 2019 (arXiv:1911.04623).

All texts share much of their feature vector, and under cosine what they share hides what tells them apart. With
``μ`` ``[hidden_size]``, the mean of the features ``f`` ``[n, hidden_size]`` of training examples under the start of the
parameters, every feature becomes::

    f' = f - μ                  (center_features)
    f" = f' / |f'|              (normalize_features)

``μ`` is a meta-parameter: training goes on from the mean. It is known from training classes alone. The cosine does not
hear a query's length, but a class mean does: there long vectors outweigh short ones, such as those of names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.data.pool import Pool
from fewshot_nlp.data.sampler import draw, generator
from fewshot_nlp.types import Params

CENTRE = "features.centre"

#: Examples behind the mean, and how many go through the backbone at once.
EXAMPLES, BATCH_SIZE = 1000, 64


def init_params(size: int) -> dict[str, Tensor]:
    """No centre yet: nothing is subtracted."""
    return {CENTRE: torch.zeros(size)}


def prepared(config: FewShotConfig, params: Params, features: Tensor) -> Tensor:
    """``features`` ``[n, hidden_size]``, centred and of unit length, as ``config`` wants them."""
    if config.center_features:
        features = features - params[CENTRE]
    return normalize(features, dim=-1) if config.normalize_features else features


@torch.no_grad()
def centred(learner: Any, params: Params, pools: Sequence[Pool], seed: int = 0) -> dict[str, Tensor]:
    """``params`` with the mean feature of examples of ``pools`` in place of the centre, where ``learner`` has one.

    Args:
        learner: whose features; one without ``center_features`` gets ``params`` back as they are.
        params: under which.
        pools: of training classes; the examples, 1,000 or all if there are fewer, are shared out among them.
        seed: of their choice.
    """
    if CENTRE not in params:
        return dict(params)
    encoder, total, count = learner.model.encoder(), torch.zeros_like(params[CENTRE]), 0
    for pool in pools:
        rows = [row for by_class in pool.rows_by_class.values() for row in by_class]
        chosen = draw(generator("centre", pool.name, seed), rows, min(len(rows), EXAMPLES // len(pools) or 1))
        for first in range(0, len(chosen), BATCH_SIZE):
            inputs = encoder.collate(encoder.encode(pool.examples(chosen[first : first + BATCH_SIZE])))
            inputs = {name: value.to(total.device) for name, value in inputs.items()}
            total += learner.model.features(params, inputs).sum(dim=0)
        count += len(chosen)
    return {**params, CENTRE: total / count}
