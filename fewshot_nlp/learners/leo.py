"""LEO: Rusu et al., Meta-Learning with Latent Embedding Optimization, ICLR 2019 (arXiv:1807.05960).

A class is a code ``z`` ``[latent_size]`` that a decoder turns into the weights ``w`` ``[hidden_size]`` of a linear
classifier, and the inner loop moves the codes, not the weights. From unit features ``f`` ``[n, hidden_size]``, with the
encoder E, the relation network R and the decoder D, and ``S`` and ``Q`` the losses of support and query set::

    (μ_c, log σ_c) = mean_{i of class c, j} R(E f_i, E f_j)          codes [n_way, latent_size]
    z_0 = μ + σ ε,   z_{k+1} = z_k - α ∇_z S(D z_k)                  logits s · f (D z)ᵀ
    w_0 = D z_K,     w_{k+1} = w_k - η ∇_w S(w_k)                    the last ``tuning_steps`` of ``inner_steps``
    meta-loss = Q(w) + β KL(N(μ, σ²) ‖ N(0, 1)) + γ |stop(z_K) - z_0|²

with the rates α and η learned, and all of it differentiated exactly. The noise ε is drawn in meta-training alone, from
the episode's own address, as in the published code; a task is learned from the mean. Also as there, KL and distance are
means over the numbers of all codes. Left out are the decoder's own noise and its penalty on correlated rows; weight
decay is the optimiser's. With ``adapter="none"`` the features stay fixed, as in the paper.

R is the paper's network plus the first code of the pair, its last layer starts at zero, and D starts as E transposed:
an untrained LEO answers as the class means do, projected on ``latent_size`` random directions; with as many as features
have numbers, nothing is lost. (The paper has 64 for 640, and no such start.) The pairs take memory with the square of
the support set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from fewshot_nlp.checks import at_least
from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.functional.networks import Networks
from fewshot_nlp.functional.outer import Carry
from fewshot_nlp.functional.rules import Point, Updates, chain, stateless
from fewshot_nlp.learners.gradient import FEATURES, GradientLearner
from fewshot_nlp.models.heads import BIAS, WEIGHT, LinearHead, class_means
from fewshot_nlp.models.model import FewShotModel
from fewshot_nlp.types import Batch, Episode, MetaGrad, Params

CODE = "head.code"
NOISE = "noise"
#: Where log σ starts: with deviations of the size that unit features' codes have.
LOG_DEVIATION = -3.0


@dataclass
class LEOOptions:
    """``latent_size``: numbers in a class's code. ``sample``: draw codes in training, in place of their means.
    ``kl_weight``, ``encoder_weight``: β and γ. ``tuning_steps``: how many of the inner steps, the last ones, change the
    decoded weights."""

    latent_size: int = 256
    sample: bool = True
    kl_weight: float = 0.001
    encoder_weight: float = 0.001
    tuning_steps: int = 0

    def __post_init__(self) -> None:
        at_least("latent_size", self.latent_size, 1)
        at_least("kl_weight", self.kl_weight, 0.0, float)
        at_least("encoder_weight", self.encoder_weight, 0.0, float)
        at_least("tuning_steps", self.tuning_steps, 0)
        if not isinstance(self.sample, bool):
            raise ValueError(f"sample={self.sample!r} must be true or false.")


class LatentHead(LinearHead):
    """A linear classifier whose weights are decoded from one code a class, plus what fine-tuning adds to them."""

    def __init__(self, config: FewShotConfig, networks: Networks, tuned: bool) -> None:
        super().__init__(config)
        self.networks, self.tuned = networks, tuned

    def codes(self, params: Params, features: Tensor, labels: Tensor, n_way: int) -> tuple[Tensor, Tensor]:
        """Mean and log deviation of each class's code, ``[n_way, latent_size]`` each."""
        encoded = self.networks("encoder", params, normalize(features, dim=-1))
        n, size = encoded.shape
        pairs = torch.cat([encoded[:, None].expand(n, n, size), encoded.expand(n, n, size)], dim=-1)
        mean, log_deviation = self.networks("relation", params, pairs).mean(dim=1).chunk(2, dim=-1)
        both = torch.cat([encoded + mean, log_deviation + LOG_DEVIATION], dim=-1)
        mean, log_deviation = class_means(both, labels, n_way).chunk(2, dim=-1)
        return mean, log_deviation

    def start(self, params: Params, features: Tensor, labels: Tensor, n_way: int) -> dict[str, Tensor]:
        code, log_deviation = self.codes(params, features, labels, n_way)
        if NOISE in params:
            code = code + log_deviation.exp() * params[NOISE]
        return {CODE: code, **({WEIGHT: features.new_zeros(n_way, features.shape[-1])} if self.tuned else {})}

    def logits(self, params: Params, state: Params, features: Tensor) -> Tensor:
        weight = self.networks("decoder", params, state[CODE])
        weight = weight + state[WEIGHT] if self.tuned else weight
        return super().logits(params, {WEIGHT: weight, BIAS: weight.new_zeros(len(weight))}, features)


class LEO(GradientLearner):
    """The inner loop in a latent space of classifiers."""

    title = "LEO ([Rusu et al. 2019](https://arxiv.org/abs/1807.05960))"
    tasks = ("classification",)
    fast_body = False
    starts_head = False
    implied: ClassVar = {"head": "linear", "distance": "cosine", "inner_rule": "meta_sgd"}
    Options = LEOOptions
    head: LatentHead

    def __init__(self, config: FewShotConfig, model: FewShotModel) -> None:
        super().__init__(config, model)
        self.head = LatentHead(self.config, self.networks, self.options.tuning_steps > 0)
        if self.options.tuning_steps:
            self.rule = chain(self.rule, stateless(self._in_turn))

    def build_networks(self) -> dict[str, nn.Module]:
        size, latent = self.model.hidden_size, self.options.latent_size
        encoder, decoder = nn.Linear(size, latent, bias=False), nn.Linear(latent, size, bias=False)
        relation = [nn.Linear(2 * latent, 2 * latent, bias=False) for _ in range(3)]
        nn.init.orthogonal_(encoder.weight)
        with torch.no_grad():
            # A projection on fewer numbers shortens inner products by latent / size on average.
            encoder.weight.mul_(max(size / latent, 1.0) ** 0.5)
            decoder.weight.copy_(encoder.weight.T)
        nn.init.zeros_(relation[-1].weight)
        layers = nn.Sequential(relation[0], nn.ReLU(), relation[1], nn.ReLU(), relation[2])
        return {"encoder": encoder, "relation": layers, "decoder": decoder}

    def _in_turn(self, updates: Updates, point: Point) -> Updates:
        """Codes move first, and the weights decoded from them after."""
        moving = CODE if point.step < self.config.inner_steps - self.options.tuning_steps else WEIGHT
        return {name: update if name == moving else torch.zeros_like(update) for name, update in updates.items()}

    def _episode_grad(self, params: Params, episode: Episode) -> MetaGrad:
        if not self.options.sample:
            return super()._episode_grad(params, episode)
        rng = torch.Generator().manual_seed(episode.spec.index)
        noise = torch.randn(episode.support.n_way, self.options.latent_size, generator=rng, dtype=torch.float64)
        like = params["learner.encoder.weight"]
        part = super()._episode_grad({**params, NOISE: noise.to(like.device, like.dtype)}, episode)
        return replace(part, grads={name: part.grads[name] for name in params})

    def _query_loss(self, episode: Episode, params: Params, carry: Carry) -> tuple[Tensor, Tensor]:
        loss, logits = super()._query_loss(episode, params, carry)
        return loss + self._penalty(params, carry, episode.support), logits

    def _penalty(self, params: Params, carry: Carry, support: Batch) -> Tensor:
        """β KL + γ |stop(z_K) - z_0|², each a mean over the numbers of all codes."""
        kept = carry.slots.get(FEATURES)
        features = self.features(params, support.inputs) if kept is None else kept
        mean, log_deviation = self.head.codes(params, features, support.labels, support.n_way)
        divergence = (mean.square() + (2 * log_deviation).exp() - 1).mean() / 2 - log_deviation.mean()
        first = self.head.start(params, features, support.labels, support.n_way)[CODE]
        distance = mse_loss(first, carry.fast[CODE].detach())
        return self.options.kl_weight * divergence + self.options.encoder_weight * distance
