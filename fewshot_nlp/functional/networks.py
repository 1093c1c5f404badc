"""Small modules of a learner's own, called with parameters that stand outside of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewshot_nlp.functional.call import full_precision, turn
from fewshot_nlp.functional.outer import drawing
from fewshot_nlp.types import Params

PREFIX = "learner."


class Networks:
    """Modules by name, whose parameters are meta-parameters called ``learner.<module>.<parameter>``.

    Args:
        build: makes the modules. Their random start follows from ``seed`` alone; modules must have no buffers, as
            nothing would save them, and behave alike in training and evaluation.
        seed: of the start.
    """

    def __init__(self, build: Callable[[], Mapping[str, nn.Module]], seed: int) -> None:
        with drawing({}, seed):
            self.modules = {name: module.requires_grad_(False) for name, module in build().items()}
        for name, module in self.modules.items():
            if any(True for _ in module.buffers()):
                raise TypeError(f"The network {name!r} has buffers, which no meta-parameter holds. Build it without.")

    def init_params(self) -> dict[str, Tensor]:
        return {
            f"{PREFIX}{name}.{own}": value.detach().clone()
            for name, module in self.modules.items()
            for own, value in module.named_parameters()
        }

    def __call__(self, name: str, params: Params, *args: Any, **kwargs: Any) -> Any:
        """What the module ``name`` answers to the arguments under the ``learner.`` entries of ``params``.

        Without autocast, which is for the backbone: what such a module writes are weights, gates and scores, for which
        the eight bits of bfloat16 are too few.
        """
        module = self.modules[name]
        own = {key: params[f"{PREFIX}{name}.{key}"] for key, _ in module.named_parameters()}
        with turn(module), full_precision(next(iter(own.values()))):
            return torch.func.functional_call(module, own, args, kwargs)
