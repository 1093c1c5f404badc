"""One micro-round: its episodes dealt to the ranks, and the sum of their gradients, the same on all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor

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
    # Learners are called outside of DistributedDataParallel, so nothing else adds the ranks up.
    numbers = [float(part.loss), float(part.accuracy), float(trainer.listener.heard)]
    scalars = torch.tensor(numbers, device=trainer.accelerator.device)
    loss, accuracy, signals = trainer.accelerator.reduce(scalars, reduction="sum")
    if signals:
        leave(trainer)
    grads = _over_ranks(trainer.accelerator, part.grads)
    return MetaGrad(grads, loss, accuracy, trainer.args.meta_batch_size)


def _over_ranks(accelerator: Accelerator, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums of the ranks' tensors. All of one type travel as one: a small message costs more than its bytes."""
    if accelerator.num_processes == 1:
        return dict(grads)
    sums: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(grad.dtype for grad in grads.values()):
        own = {name: grad for name, grad in grads.items() if grad.dtype == dtype}
        flat = accelerator.reduce(torch.cat([grad.flatten() for grad in own.values()]), reduction="sum")
        parts = flat.split([grad.numel() for grad in own.values()])
        sums |= {name: part.view_as(own[name]) for name, part in zip(own, parts, strict=True)}
    return {name: sums[name] for name in grads}


def _summed(trainer: FewShotTrainer, episodes: list[Episode]) -> MetaGrad:
    if episodes:
        return trainer.learner.meta_grad(trainer.current_params(), episodes)
    zero = torch.zeros((), device=trainer.accelerator.device)
    return MetaGrad({name: torch.zeros_like(param) for name, param in trainer.params.items()}, zero, zero, 0)
