"""Calling a module with other parameters than its own, strictly."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fewshot_nlp.types import Params


def trainable(module: nn.Module) -> tuple[str, ...]:
    """Names of the module's parameters that require gradients, in the module's order."""
    return tuple(name for name, parameter in module.named_parameters() if parameter.requires_grad)


def call(module: nn.Module, names: tuple[str, ...], params: Params, **inputs: Any) -> Any:
    """``module(**inputs)`` with the parameters ``names`` replaced by ``params``; the others stay frozen.

    ``torch.func.functional_call`` ignores names it does not know, which silently trains nothing; here a missing or
    an unknown name raises ``KeyError``.
    """
    if params.keys() != set(names):
        unknown, missing = sorted(params.keys() - set(names)), sorted(set(names) - params.keys())
        raise KeyError(f"Parameters do not fit the model: unknown {unknown[:5]}, missing {missing[:5]}.")
    return torch.func.functional_call(module, dict(params), kwargs=inputs)
