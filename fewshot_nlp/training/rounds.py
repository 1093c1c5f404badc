"""One micro-round: its episodes dealt to the ranks, and the sum of their gradients, the same on all of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from fewshot_nlp.training.faults import read_episode
from fewshot_nlp.training.interrupts import leave
from fewshot_nlp.types import Episode, MetaGrad

if TYPE_CHECKING:
    from fewshot_nlp.training.trainer import FewShotTrainer


def own_indices(trainer: FewShotTrainer, micro_round: int) -> range:
    """Indices of this rank's episodes of a micro-round of the current step."""
    indices = trainer.step_indices(trainer.state.global_step, micro_round)
    return indices[trainer.accelerator.process_index :: trainer.accelerator.num_processes]


def read_episodes(trainer: FewShotTrainer, indices: Iterable[int]) -> list[Episode]:
    """The training episodes at ``indices``, where the model is."""
    device = trainer.accelerator.device
    return [read_episode(trainer.reader, trainer.train_sampler[i]).to(device) for i in indices]


def summed_over_ranks(trainer: FewShotTrainer, micro_round: int) -> MetaGrad:
    """Summed gradients of a micro-round, over all ranks; if any of them was told to leave, all do."""
    episodes = read_episodes(trainer, own_indices(trainer, micro_round))
    with trainer.accelerator.autocast():
        part = _summed(trainer, episodes)
    if part.grads.keys() != trainer.params.keys():
        raise ValueError(f"meta_grad left out or added {sorted(part.grads.keys() ^ trainer.params.keys())}.")
    # Learners are called outside of DistributedDataParallel, so nothing else adds the ranks up. A gradient may come
    # transposed in memory, and ranks add up memory.
    parts = {name: grad.contiguous() for name, grad in part.grads.items()}
    parts |= {"loss": part.loss, "accuracy": part.accuracy, "signals": part.loss.new_tensor(trainer.listener.heard)}
    sums = trainer.accelerator.reduce(parts, reduction="sum")
    if sums.pop("signals"):
        leave(trainer)
    return MetaGrad(sums, sums.pop("loss"), sums.pop("accuracy"), trainer.args.meta_batch_size)


def _summed(trainer: FewShotTrainer, episodes: list[Episode]) -> MetaGrad:
    if episodes:
        return trainer.learner.meta_grad(trainer.detached_params(), episodes)
    zero = torch.zeros((), device=trainer.accelerator.device)
    return MetaGrad({name: torch.zeros_like(param) for name, param in trainer.params.items()}, zero, zero, 0)
