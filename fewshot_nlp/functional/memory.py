"""How much memory a graph holds, counted and not guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def graph_bytes(function: Callable[[], Any], own: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of ``function``, each storage counted once.

    Args:
        function: what is recorded; its result is kept until the count is over.
        own: tensors that are in memory anyway, such as the model's weights.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}
    # Storages are told apart by their address, so none may be freed and used again while they are counted.
    alive = []

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        result = function()
    del result
    return sum(kept.values())
