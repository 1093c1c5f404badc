"""Heads: from support features to a task's classifier, and from query features to logits.

A head is two pure functions. ``start`` makes the task's own state from the support set; ``logits`` uses it. Every head
of classes treats them alike, so that permuting the labels permutes the logits and any number of classes will do.

Where ``config.head_reads_names``, the last ``n_way`` of the support features are those of the names of the classes, in
the order of the labels, and labelled as examples.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.functional.call import full_precision
from fewshot_nlp.types import OUT_OF_SCOPE, Params

SCALE = "head.log_scale"
WEIGHT = "head.weight"
BIAS = "head.bias"
NAME_WEIGHT = "head.log_name_weight"


class Head(Protocol):
    """What a learner asks of a head."""

    #: Whether the inner loop changes the state itself (linear) or the state follows from the features (prototype).
    fast: bool

    @property
    def blind(self) -> bool:
        """Whether what it starts as gives all features the same logits, whatever the parameters."""
        ...

    def init_params(self) -> dict[str, Tensor]: ...

    def start(self, params: Params, features: Tensor, labels: Tensor, n_way: int) -> dict[str, Tensor]: ...

    def logits(self, params: Params, state: Params, features: Tensor) -> Tensor: ...


def class_means(features: Tensor, labels: Tensor, n_way: int, weights: Tensor | None = None) -> Tensor:
    """Mean feature of each class, ``[n_way, size]``, from ``[n, size]`` and ``[n]``; any counts above zero. Examples of
    no class (``OUT_OF_SCOPE``) are in none.

    With ``weights`` ``[n]``, each example counts for so many.
    """
    member = torch.nn.functional.one_hot(labels - OUT_OF_SCOPE, n_way + 1)[:, 1:].to(features.dtype)
    if weights is not None:
        member = member * weights[:, None]
    with full_precision(features):
        return (member.T @ features) / member.sum(dim=0)[:, None]


def own_params(config: FewShotConfig) -> dict[str, Tensor]:
    """Starts of the learned scale and of the learned weight of a name; logarithms, so that they stay positive."""
    params = {SCALE: torch.tensor(math.log(config.logit_scale))}
    if config.learn_label_name_weight:
        params[NAME_WEIGHT] = torch.tensor(math.log(config.label_name_weight))
    return params


def centres(config: FewShotConfig, params: Params, features: Tensor, labels: Tensor, n_way: int) -> Tensor:
    """Class means ``[n_way, size]``; a name ``g`` of learned weight ``w`` beside ``k`` examples makes
    ``(Σ f + w g) / (k + w)``."""
    if not config.learn_label_name_weight:
        return class_means(features, labels, n_way)
    weight = params[NAME_WEIGHT].exp().to(features.dtype).expand(n_way)
    return class_means(features, labels, n_way, torch.cat([weight.new_ones(len(labels) - n_way), weight]))


class PrototypeHead:
    """Nearest class mean (Snell et al. 2017): ``s · cos(f, c)``, or ``-s · |f - c|²``, with ``s`` learned."""

    fast, blind = False, False

    def __init__(self, config: FewShotConfig) -> None:
        self.config = config

    def init_params(self) -> dict[str, Tensor]:
        return own_params(self.config)

    def start(self, params: Params, features: Tensor, labels: Tensor, n_way: int) -> dict[str, Tensor]:
        return {WEIGHT: centres(self.config, params, features, labels, n_way)}

    def logits(self, params: Params, state: Params, features: Tensor) -> Tensor:
        means = state[WEIGHT]
        if self.config.distance == "cosine":
            with full_precision(features):
                similarity = normalize(features, dim=-1) @ normalize(means, dim=-1).T
        else:
            similarity = -(features[:, None] - means[None]).square().sum(dim=-1)
        return params[SCALE].exp() * similarity


class LinearHead:
    """A linear classifier with its own fast weights: ``s · (f W^T + b)``; ``f`` has unit length under cosine.

    It starts a task at zero, or at the prototypes (ProtoMAML, Triantafillou et al. 2020), where it equals the prototype
    head before the first step: ``W = c / |c|, b = 0`` under cosine; ``W = 2c, b = -|c|²`` under Euclidean distance,
    whose ``|f|²`` is the same for every class and drops out of the softmax. With ``head_init="names"`` the features of
    the names stand for ``c``, and the examples come in through the inner loop.

    One meta-learned vector for all classes to start from (UNICORN-MAML, Ye and Chao 2022) would drop out of the softmax
    too, at every step: it acts as zero does, and its meta-gradient vanishes.
    """

    fast = True

    def __init__(self, config: FewShotConfig) -> None:
        self.config = config

    @property
    def blind(self) -> bool:
        # It is this class's zero, and not what another, or this very head, was given in place of it.
        own = [getattr(getattr(self, name), "__func__", None) for name in ("start", "logits", "_linear")]
        return self.config.head_init == "zero" and own == [LinearHead.start, LinearHead.logits, LinearHead._linear]

    def init_params(self) -> dict[str, Tensor]:
        return own_params(self.config)

    def start(self, params: Params, features: Tensor, labels: Tensor, n_way: int) -> dict[str, Tensor]:
        zeros = features.new_zeros(n_way)
        if self.config.head_init == "zero":
            return {WEIGHT: features.new_zeros(n_way, features.shape[-1]), BIAS: zeros}
        by_names = self.config.head_init == "names"
        means = features[-n_way:] if by_names else centres(self.config, params, features, labels, n_way)
        if self.config.distance == "cosine":
            return {WEIGHT: normalize(means, dim=-1), BIAS: zeros}
        return {WEIGHT: 2 * means, BIAS: -means.square().sum(dim=-1)}

    def logits(self, params: Params, state: Params, features: Tensor) -> Tensor:
        if self.config.distance == "cosine":
            features = normalize(features, dim=-1)
        return self._linear(params, state, features)

    def _linear(self, params: Params, state: Params, features: Tensor) -> Tensor:
        with full_precision(features):
            return params[SCALE].exp() * (features @ state[WEIGHT].T + state[BIAS])


class VerbalizerHead(LinearHead):
    """What a language model says of a text, from a start that a task may change (Hou et al. 2022, arXiv:2209.11486).

    ``s · (f W^T + b)``, where ``W`` are the features of the names, that is, of the words that stand for the classes;
    features that are scores of names already, ``[n, n_way]``, start at ``W = 1``. With ``b = 0`` and ``s = 1`` the
    logits are the language model's. It prefers some names whatever the text; with ``config.calibrate``, ``-b`` starts
    at their mean scores over the examples, classes weighted alike (after Zhou et al. 2024, arXiv:2309.17249).

    Scores of names are log-likelihoods, with much in common that tells no class from another and would drive the inner
    loop: each text's are taken less their mean, which the softmax does not see, and ``b`` is added to them, in front of
    ``W``: ``s · (f - mean(f) + b) W^T``.
    """

    def __init__(self, config: FewShotConfig, scores_names: bool) -> None:
        super().__init__(config)
        self.scores_names = scores_names

    def start(self, params: Params, features: Tensor, labels: Tensor, n_way: int) -> dict[str, Tensor]:
        known = labels != OUT_OF_SCOPE
        weight = torch.eye(n_way).to(features) if self.scores_names else features[-n_way:]
        bias = features.new_zeros(n_way)
        if self.config.calibrate and known.any():
            said = self._centred(features[known]) @ weight.T
            # Of the classes that have examples: a task may be told the others by name alone.
            found, own = labels[known].unique(return_inverse=True)
            bias = bias - class_means(said, own, len(found)).mean(dim=0)
        # A view, so that a gradient with respect to the weights does not see that the biases were made from them, too.
        return {WEIGHT: weight.view_as(weight), BIAS: bias}

    def logits(self, params: Params, state: Params, features: Tensor) -> Tensor:
        if not self.scores_names:
            return self._linear(params, state, features)
        with full_precision(features):
            return params[SCALE].exp() * (self._centred(features) + state[BIAS]) @ state[WEIGHT].T

    def _centred(self, features: Tensor) -> Tensor:
        return features - features.mean(dim=-1, keepdim=True) if self.scores_names else features


class RegressionHead:
    """One number an example, ``f w^T + b``, from features as they are; ``w`` ``[1, size]`` and ``b`` ``[1]``.

    Every task has one output, so that its weights are meta-parameters like the others (MAML, Finn et al. 2017): a task
    starts at them, and where ``fast``, the inner loop goes on from there. Untrained they are zero.
    """

    def __init__(self, size: int, fast: bool = True) -> None:
        self.size, self.fast, self.blind = size, fast, False

    def init_params(self) -> dict[str, Tensor]:
        return {WEIGHT: torch.zeros(1, self.size), BIAS: torch.zeros(1)}

    def start(self, params: Params, features: Tensor, labels: Tensor, n_way: int) -> dict[str, Tensor]:
        return {WEIGHT: params[WEIGHT], BIAS: params[BIAS]}

    def logits(self, params: Params, state: Params, features: Tensor) -> Tensor:
        # Under autocast, features of a network from scratch are in half precision.
        dtype = torch.promote_types(features.dtype, state[WEIGHT].dtype)
        with full_precision(features):
            return features.to(dtype) @ state[WEIGHT].to(dtype).T + state[BIAS]


def build_head(config: FewShotConfig, size: int, fast: bool = True, scores_names: bool = False) -> Head:
    """The head that ``config`` names, on features of ``size``.

    Args:
        config: its ``task`` and ``head`` decide.
        size: of a feature.
        fast: a task may change a head that is learned.
        scores_names: features are scores of the names of the classes.
    """
    if config.task == "regression":
        return RegressionHead(size, fast)
    if config.head == "verbalizer":
        return VerbalizerHead(config, scores_names)
    return PrototypeHead(config) if config.head == "prototype" else LinearHead(config)
