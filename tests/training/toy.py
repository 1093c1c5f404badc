"""A learner whose gradient can be written down, and tasks for it: softmax regression on vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from fewshot_nlp.training import FewShotTrainer, FewShotTrainingArguments
from fewshot_nlp.types import Batch, Episode, EpisodeSpec, MetaGrad, Params, State

SIZE, WAYS, QUERIES = 4, 3, 6


class ToyLearner:
    """Logits ``x @ w``; no adaptation. ``d loss / d w = x' (softmax(x w) - y) / n``."""

    transductive = False

    def init_params(self) -> dict[str, Tensor]:
        return {"head.w": torch.linspace(-1, 1, SIZE * WAYS).reshape(SIZE, WAYS)}

    def adapt(self, params: Params, support: Batch) -> State:
        return None

    def predict(self, params: Params, state: State, query: Batch) -> Tensor:
        return query.inputs["x"] @ params["head.w"]

    def meta_grad(self, params: Params, episodes: Sequence[Episode]) -> MetaGrad:
        zero = torch.zeros(())
        total = MetaGrad({"head.w": torch.zeros(SIZE, WAYS)}, zero, zero, 0)
        for episode in episodes:
            logits, labels = self.predict(params, None, episode.query), episode.query.labels
            grad = hand_gradient(params["head.w"], episode)
            accuracy = (logits.argmax(-1) == labels).float().mean()
            total = total + MetaGrad({"head.w": grad}, cross_entropy(logits, labels), accuracy, 1, [logits])
        return total


class ToySampler:
    """Addresses only; the index is all there is."""

    def __init__(self, split: str = "train", n_way: int = WAYS, num_episodes: int | None = None) -> None:
        self.split, self.n_way, self.num_episodes = split, n_way, num_episodes

    def __getitem__(self, index: int) -> EpisodeSpec:
        classes = tuple(f"class {c}" for c in range(self.n_way))
        return EpisodeSpec(self.split, index, "toy", classes, ((0,),) * self.n_way, ((0, 1),) * self.n_way)


def toy_reader(spec: EpisodeSpec) -> Episode:
    """An episode that depends on its address alone, and can be learned."""
    rng = torch.Generator().manual_seed(spec.index + 1000 * (spec.split != "train"))
    labels = torch.arange(WAYS).repeat_interleave(QUERIES // WAYS)
    x = torch.randn(QUERIES, SIZE, generator=rng) + 2 * one_hot(labels, SIZE)
    batch = Batch({"x": x}, labels, WAYS)
    return Episode(spec, batch, batch)


def hand_gradient(w: Tensor, episode: Episode) -> Tensor:
    x, y = episode.query.inputs["x"], one_hot(episode.query.labels, WAYS)
    return x.T @ (torch.softmax(x @ w, -1) - y) / len(x)


def mean_gradient(w: Tensor, indices: range) -> Tensor:
    sampler = ToySampler()
    return sum((hand_gradient(w, toy_reader(sampler[i])) for i in indices), torch.zeros(SIZE, WAYS)) / len(indices)


def toy_args(output_dir: Any, **settings: Any) -> FewShotTrainingArguments:
    defaults = {
        "max_steps": 6,
        "meta_batch_size": 3,
        "learning_rate": 0.1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 2,
        "eval_episodes": 4,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return FewShotTrainingArguments(output_dir=str(output_dir), **{**defaults, **settings})


def toy_trainer(output_dir: Any, learner: Any = None, callbacks: Any = (), **settings: Any) -> FewShotTrainer:
    args = toy_args(output_dir, **settings)
    evals = {"1-shot": ToySampler("validation"), "5-shot": ToySampler("other")} if args.eval_strategy != "no" else None
    return FewShotTrainer(learner or ToyLearner(), args, ToySampler(), toy_reader, evals, callbacks)
