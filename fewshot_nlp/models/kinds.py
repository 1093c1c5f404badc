"""Which of PEFT's kinds of adapters, and which backbones, cannot be meta-learned, and why; found by what they do where
that shows.

Everything a learner computes is a function of parameters that it hands in. What keeps something of its own in the
module, or has no gradient or a wrong one, would train silently astray.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

#: By PEFT's name of the kind. All were tried on tiny models with peft 0.21.
REFUSED = {
    "C3A": "PEFT's backward pass of its circular convolution is not the derivative of the forward pass",
    "CPT": "it needs the labels of a language model's tokens",
    "FROD": "it goes through sparse matrices, whose second derivatives torch gets wrong",
    "LILY": "it mixes its experts by their mean over the batch, so that a text's features depend on its neighbours",
    "MULTITASK_PROMPT_TUNING": "it asks for the number of a task in every call",
    "POLY": "it asks for the number of a task in every call",
    "SHIRA": "it makes its sparse update from the module's own values, which has no gradient",
    "XLORA": "it is made of adapters that are trained already",
}
#: The same of settings of LoRA's.
REFUSED_SETTINGS = {
    "arrow_config": "it is made of adapters that are trained already",
    "layer_replication": "it changes the backbone itself",
    "monteclora_config": "it draws its weights at random",
    "velora_config": "it estimates its own gradient",
}
#: Backbones that have no second derivatives, by ``model_type``, and why.
UNTRAINABLE = {
    "rwkv": "it writes its state over in place, which has no gradient, and its kernel for GPUs has no second one",
}
REMEDY = "Use adapter='lora', 'ia3', 'bitfit', 'layernorm' or 'prompt_tuning', or another PEFT configuration"


def check_kind(settings: Any) -> None:
    """Raise ``ValueError`` where a PEFT configuration is of a kind that cannot be meta-learned."""
    kind = getattr(settings.peft_type, "value", str(settings.peft_type))
    found = {kind: REFUSED[kind]} if kind in REFUSED else {}
    found |= {f"{kind} with {n}": why for n, why in REFUSED_SETTINGS.items() if getattr(settings, n, None) is not None}
    for what, why in found.items():
        raise ValueError(f"PEFT's {what} cannot be meta-learned: {why}. {REMEDY}.")


def check_trainable(module: Any) -> None:
    """Raise ``ValueError`` where no gradient goes through a backbone, whatever the adapter."""
    kind = getattr(module.config, "model_type", "")
    if kind in UNTRAINABLE:
        raise ValueError(
            f"The backbone {module.name_or_path!r}, of model type {kind!r}, cannot be meta-learned: "
            f"{UNTRAINABLE[kind]}. Use adapter='none', or another backbone, such as 'state-spaces/mamba-130m-hf'."
        )


def fingerprint(params: Iterable[nn.Parameter]) -> list[float]:
    """A number for each parameter of a backbone, to see whether an adapter changed one."""
    return [float(value.detach().sum(dtype=torch.float64)) for value in params]


def check_wrapped(wrapped: nn.Module, kind: str, own: list[nn.Parameter], before: list[float]) -> None:
    """Raise ``ValueError`` where an adapter is no pure function of its parameters, or changed the backbone.

    Args:
        wrapped: the backbone with its adapter.
        kind: of the adapter, as PEFT names it.
        own: the backbone's parameters, from before.
        before: their fingerprints.
    """
    reason = None
    trained = [value for value in wrapped.parameters() if value.requires_grad]
    if not trained:
        reason = "it trains no parameter of this backbone"
    elif any(value._backward_hooks for value in trained):
        reason = "it changes gradients by hooks on the module's own parameters, which other parameters do not pass"
    elif fingerprint(own) != before:
        reason = (
            "its start changes the backbone's own weights, which baselines and other adapters share. Use a start that "
            "leaves them, such as init_lora_weights=True"
        )
    elif _is_shared(wrapped):
        reason = "its parameters are in one module that stands in several layers, where torch cannot replace them"
    if reason:
        raise ValueError(f"PEFT's {kind} cannot be meta-learned here: {reason}. {REMEDY}.")


def _is_shared(wrapped: nn.Module) -> bool:
    """Whether a module that holds trained parameters has more than one name."""
    seen = set[int]()
    for _, part in wrapped.named_modules(remove_duplicate=False):
        if id(part) in seen and any(value.requires_grad for value in part.parameters(recurse=False)):
            return True
        seen.add(id(part))
    return False
