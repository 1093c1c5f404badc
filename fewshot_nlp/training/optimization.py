"""The outer optimiser and its learning rate, and their state as safetensors and JSON take it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from fewshot_nlp.training.arguments import FewShotTrainingArguments

#: Owners of meta-parameters that never decay.
_AT_REST = ("rule.", "features.")


def build_optimizer(params: Mapping[str, nn.Parameter], args: FewShotTrainingArguments) -> Optimizer:
    """AdamW or plain SGD over the meta-parameters.

    As transformers' trainer has it, biases and the scales of norms do not decay, nor does whatever else is no matrix,
    such as the scale of the logits; nor learned rates, and what is subtracted from features.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, param in params.items():
        decays = param.dim() > 1 and not name.startswith(_AT_REST)
        groups.setdefault(args.weight_decay if decays else 0.0, []).append(param)
    settings = [{"params": group, "weight_decay": decay} for decay, group in groups.items()]
    if args.optim == "sgd":
        return torch.optim.SGD(settings, lr=args.learning_rate)
    return torch.optim.AdamW(
        settings, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon
    )


def build_scheduler(optimizer: Optimizer, args: FewShotTrainingArguments) -> LRScheduler:
    """transformers' scheduler of that name. It is stepped once an optimiser step, by every process alike."""
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.warmup_steps,
        num_training_steps=args.max_steps,
    )


def optimizer_tensors(optimizer: Optimizer, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """State of the optimiser by ``<kind>.<parameter>``, such as ``exp_avg.head.w``."""
    return {
        f"{kind}.{name}": value
        for name, param in params.items()
        for kind, value in optimizer.state.get(param, {}).items()
        if value is not None
    }


def load_optimizer_tensors(
    optimizer: Optimizer, params: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what ``optimizer_tensors`` gave."""
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        state.setdefault(name, {})[kind] = value
    optimizer.state.clear()
    for name, values in state.items():
        # The step count stays on the CPU, where torch's optimisers keep it.
        optimizer.state[params[name]] = {
            kind: value if kind == "step" else value.to(params[name].device) for kind, value in values.items()
        }


def scheduler_state(scheduler: LRScheduler) -> dict[str, Any]:
    """State of the scheduler, numbers and lists only: the shape itself is built anew from the settings."""
    return {name: value for name, value in scheduler.state_dict().items() if name != "lr_lambdas"}


def load_scheduler_state(scheduler: LRScheduler, state: Mapping[str, Any]) -> None:
    """Put back what ``scheduler_state`` gave, and the learning rate with it."""
    scheduler.load_state_dict({**scheduler.state_dict(), **state})
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
