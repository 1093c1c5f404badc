"""Features around their mean, whitened, and of unit length; after SimpleShot's "CL2N", Wang et al. 2019
(arXiv:1911.04623), and within-class covariance normalisation, Hatch et al. 2006.

All texts share much of their feature vector, and under cosine what they share hides what tells them apart. With
``μ`` ``[hidden_size]``, the mean of the features ``f`` ``[n, hidden_size]`` of training examples under the start of the
parameters, every feature becomes::

    f1 = f - μ                                      (center_features)
    f2 = A f1 / |f1|,   A = ((1 - w) I + w C)^-1/2  (whiten_features: w)
    f3 = f2 / |f2|                                  (normalize_features)

``C`` ``[hidden_size, hidden_size]`` is the covariance of unit features ``f1 / |f1|`` within training classes, scaled to
a mean variance of 1: directions in which examples of one class differ count less, and the share ``w`` says how much.
``μ`` and ``A`` are meta-parameters: training goes on from them, and a run that whitens finds both anew once training is
over, after its last validation; in Python that is ``centred``. They are known from training classes alone. The cosine
does not hear a query's length, but a class mean does: there long vectors outweigh short ones, such as those of names.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.data.pool import Pool
from fewshot_nlp.data.sampler import draw, generator
from fewshot_nlp.functional.call import full_precision
from fewshot_nlp.models.cache import embedded
from fewshot_nlp.models.heads import class_means
from fewshot_nlp.types import Params

CENTRE, WHITENING = "features.centre", "features.whitening"

#: Examples behind the mean, and behind the covariance; how many are in memory at once.
EXAMPLES, COVARIANCE_EXAMPLES, READ_AT_ONCE = 1000, 4000, 256


def init_params(config: FewShotConfig, size: int) -> dict[str, Tensor]:
    """What ``config`` asks for, which does nothing yet: no centre is subtracted, and all directions count alike."""
    centre = {CENTRE: torch.zeros(size)} if config.center_features else {}
    return centre | ({WHITENING: torch.eye(size)} if config.whiten_features else {})


def prepared(config: FewShotConfig, params: Params, features: Tensor) -> Tensor:
    """``features`` ``[n, hidden_size]``, centred, whitened and of unit length, as ``config`` wants them."""
    if config.center_features:
        features = features - params[CENTRE]
    if config.whiten_features:
        with full_precision(features):
            features = normalize(features, dim=-1) @ params[WHITENING].T
    return normalize(features, dim=-1) if config.normalize_features else features


@torch.no_grad()
def centred(learner: Any, params: Params, pools: Sequence[Pool], seed: int = 0) -> dict[str, Tensor]:
    """``params`` with centre and whitening from examples of ``pools`` in place, where ``learner`` has them.

    Args:
        learner: whose features; one with neither gets ``params`` back as they are.
        params: under which.
        pools: of training classes; the examples, 1,000, or 4,000 for a covariance, or all if there are fewer, are
            shared out among them.
        seed: of their choice.

    Raises:
        ValueError: with ``whiten_features``, no class has two examples that differ.
    """
    wanted = {CENTRE, WHITENING} & params.keys()
    if not wanted:
        return dict(params)
    most = COVARIANCE_EXAMPLES if WHITENING in wanted else EXAMPLES
    found: list[Tensor] = []
    classes: list[str] = []
    for pool in pools:
        rows = [(name, row) for name, by_class in pool.rows_by_class.items() for row in by_class]
        chosen = draw(generator("centre", pool.name, seed), rows, min(len(rows), most // len(pools) or 1))
        classes += [f"{pool.name}/{name}" for name, _ in chosen]
        for first in range(0, len(chosen), READ_AT_ONCE):
            examples = pool.examples([row for _, row in chosen[first : first + READ_AT_ONCE]])
            # Sums are in double precision, which not every accelerator has.
            found.append(embedded(learner.model, partial(learner.bare_features, params), examples).double())
    features, params = torch.cat(found), dict(params)
    if CENTRE in wanted:
        mean = features.mean(dim=0)
        features, params[CENTRE] = features - mean, mean.to(params[CENTRE])
    if WHITENING in wanted:
        params[WHITENING] = whitening(features, classes, learner.config.whiten_features).to(params[WHITENING])
    return params


def whitening(features: Tensor, classes: Sequence[str], share: float) -> Tensor:
    """``A`` ``[hidden_size, hidden_size]`` of the module's docstring, symmetric, from ``features`` ``[n, hidden_size]``
    around the mean, of ``classes`` ``[n]``; ``share`` is ``w``, from 0 to less than 1."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(classes))}
    labels = torch.tensor([numbers[name] for name in classes])
    unit = normalize(features, dim=-1)
    within = unit - class_means(unit, labels, len(numbers))[labels]
    covariance = within.T @ within
    variance = covariance.diagonal().mean()
    # The same text is not quite the same feature in another batch.
    if not variance > 1e-10 * len(classes):
        raise ValueError(
            f"whiten_features={share} needs the covariance within training classes, and no class here has two examples "
            f"that differ: {len(classes)} examples of {len(numbers)} classes. Give more examples, or leave it out."
        )
    mixed = share * covariance / variance
    mixed.diagonal().add_(1 - share)
    variances, directions = torch.linalg.eigh(mixed)
    return directions * variances.rsqrt() @ directions.T
