"""Calling a module with other parameters than its own, strictly, and with gradient checkpointing that sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewshot_nlp.functional.twice import ClosedForms
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
    an unknown name raises ``KeyError``. Where transformers' gradient checkpointing is on, what is computed again in
    the backward pass is computed with ``params`` again; a module that checkpoints itself in another way raises.
    """
    check_names(params, set(names))
    with _checkpointing(module, params), ClosedForms(), casting_anew():
        return torch.func.functional_call(module, dict(params), kwargs=inputs, tie_weights=_is_tied(module))


def run(module: nn.Module, names: tuple[str, ...], params: Params, function: Callable[[], Any]) -> Any:
    """``function()``, which calls ``module`` or its parts as it likes, under the same terms as ``call``."""
    check_names(params, set(names))
    values = {f"module.{name}": value for name, value in params.items()}
    with _checkpointing(module, params), ClosedForms(), casting_anew():
        return torch.func.functional_call(_Within(module), values, (function, ()))


@contextmanager
def casting_anew() -> Iterator[None]:
    """A block in which autocast keeps no weight that it has cast.

    What it keeps of a leaf stays until autocast ends, with the leaf itself: inner loops make leaves in every step, and
    an evaluation would keep those of all its episodes.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def full_precision(like: Tensor) -> torch.autocast:
    """A block without autocast on the device of ``like``: in the eight bits of bfloat16 many cosines tie, and argmax
    takes the first class."""
    return torch.autocast(like.device.type, enabled=False)


#: Not in the modules, as a lock can be neither copied nor pickled.
_turns: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()


def turn(module: nn.Module) -> RLock:
    """What a thread holds while it calls ``module``, which holds the parameters that it is called with meanwhile."""
    return _turns.setdefault(module, RLock())


_tied: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _is_tied(module: nn.Module) -> bool:
    """Whether a parameter or buffer has two names. To look takes as long as a small layer, so it is done once."""
    if module not in _tied:
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        _tied[module] = len(named) > len({id(value) for _, value in named})
    return _tied[module]


class _Reached(Exception):
    """Ends a forward pass at a layer."""

    def __init__(self, given: tuple[Any, ...]) -> None:
        self.given = given


def inputs_of(layer: nn.Module, forward: Callable[[], Any]) -> tuple[Any, ...]:
    """What ``forward()`` first gives to ``layer``, by place; there it ends: what comes after is never computed."""

    def reached(part: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Reached(args)

    hook = layer.register_forward_pre_hook(reached)
    try:
        forward()
    except _Reached as top:
        return top.given
    finally:
        hook.remove()
    raise RuntimeError(f"The pass does not reach {type(layer).__name__}.")


class _Within(nn.Module):
    """Runs any function while ``module`` has other parameters, through ``functional_call``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        return function(*args)


@contextmanager
def _checkpointing(module: nn.Module, params: Params) -> Iterator[None]:
    """Let the parts of ``module`` that checkpoint themselves do it under ``params``.

    transformers' own function runs a layer again when ``functional_call`` has long put the module's own parameters
    back: the gradient is then silently that of other weights. Here they are arguments of the checkpoint.
    """
    parts: list[Any] = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]
    if not parts:
        yield
        return
    names, within = list(params), _Within(module)

    def again(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def run(*tensors: Any) -> Any:
            values = {f"module.{name}": value for name, value in zip(names, tensors, strict=False)}
            # The backward pass, where this runs again, may be in a thread of its own.
            with ClosedForms():
                return torch.func.functional_call(within, values, (function, tensors[len(names) :]))

        return checkpoint(run, *params.values(), *args, use_reentrant=False, **kwargs)

    before = [getattr(part, "_gradient_checkpointing_func", None) for part in parts]
    for part in parts:
        part._gradient_checkpointing_func = again
    try:
        yield
    finally:
        for part, function in zip(parts, before, strict=True):
            part._gradient_checkpointing_func = function
