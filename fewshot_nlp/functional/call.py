"""Calling a module with other parameters than its own, strictly."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import nn

from fewshot_nlp.types import Params


def trainable(module: nn.Module) -> tuple[str, ...]:
    """Names of the module's parameters that require gradients, in the module's order."""
    return tuple(name for name, parameter in module.named_parameters() if parameter.requires_grad)


def check_names(params: Params, names: Set[str]) -> None:
    """Raise ``KeyError`` unless ``params`` has exactly the entries ``names``."""
    if params.keys() != names:
        unknown, missing = sorted(params.keys() - names), sorted(names - params.keys())
        raise KeyError(f"Parameters do not fit the model: unknown {unknown[:5]}, missing {missing[:5]}.")


def call(module: nn.Module, names: tuple[str, ...], params: Params, **inputs: Any) -> Any:
    """``module(**inputs)`` with the parameters ``names`` replaced by ``params``; the others stay frozen.

    ``torch.func.functional_call`` ignores names it does not know, which silently trains nothing; here a missing or
    an unknown name raises ``KeyError``.
    """
    check_names(params, set(names))
    return torch.func.functional_call(module, dict(params), kwargs=inputs)
