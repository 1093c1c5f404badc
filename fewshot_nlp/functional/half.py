"""Products with frozen matrices in bfloat16, everything else as it is.

In an adapter's inner loop nearly all arithmetic is a product with a matrix that never changes. Processors that compute
in bfloat16 do these several times faster; fast weights, their gradients, norms and softmax stay in full precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class HalfFrozen(TorchFunctionMode):
    """A block in which linear layers with frozen weights compute in bfloat16.

    A weight is converted once and kept beside the original, at half its size; it is converted again if it was written
    to or moved.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[int, tuple[Tensor, Tensor, int, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and not kwargs and _suits(*args[:2]):
            given, weight, *rest = args
            bias = None if not rest or rest[0] is None else rest[0].to(torch.bfloat16)
            return functional.linear(given.to(torch.bfloat16), self._half(weight), bias).to(given.dtype)
        # GPT-2 multiplies so.
        if func is torch.addmm and not kwargs and _suits(*args[1:]):
            bias, given, weight = args
            return torch.addmm(bias.to(torch.bfloat16), given.to(torch.bfloat16), self._half(weight)).to(given.dtype)
        return func(*args, **(kwargs or {}))

    def __reduce__(self) -> tuple[type[HalfFrozen], tuple[()]]:
        # What is kept can be made again.
        return HalfFrozen, ()

    def _half(self, weight: Tensor) -> Tensor:
        known = self._kept.get(id(weight))
        # A weight whose data was exchanged lies elsewhere, though it is the same tensor, as often written to.
        if (
            known is None
            or known[0] is not weight
            or known[1].data_ptr() != weight.data_ptr()
            or known[2] != weight._version
        ):
            # The original and its memory are kept too, so that no other tensor can take its id or its place.
            seen = weight.detach()
            self._kept[id(weight)] = known = (weight, seen, weight._version, seen.to(torch.bfloat16))
        return known[3]


def _suits(given: Tensor, weight: Any) -> bool:
    # Fast weights are plain tensors.
    frozen = isinstance(weight, nn.Parameter) and not weight.requires_grad and weight.dtype == torch.float32
    return frozen and given.dtype == torch.float32
