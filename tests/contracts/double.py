"""Everything in float64, also where a model asks for float32, so that differences of gradients can be tight; and such a
difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class KeepDouble(TorchFunctionMode):
    """A block in which tensors of float64 stay so, and new ones are: RMS norms, rotary positions and some adapters go
    through float32."""

    def __enter__(self) -> Any:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self.before)
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func is torch.Tensor.to:
                args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def hessian_is_exact(
    loss: Callable[[dict[str, Tensor]], Tensor], params: dict[str, Tensor], rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    """A Hessian-vector product of ``loss`` at ``params``, seen along another vector, is the central difference of its
    gradient."""
    rng = torch.Generator().manual_seed(3)
    vector, other = (
        {name: torch.randn(value.shape, generator=rng, dtype=torch.float64) for name, value in params.items()}
        for _ in range(2)
    )

    def gradient(at: dict[str, Tensor], create_graph: bool = False) -> dict[str, Tensor]:
        grads = torch.autograd.grad(loss(at), list(at.values()), create_graph=create_graph, materialize_grads=True)
        return dict(zip(at, grads, strict=True))

    def dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return sum(((a[name] * b[name]).sum() for name in a), torch.zeros((), dtype=torch.float64))

    product = torch.autograd.grad(
        dot(gradient(params, create_graph=True), vector), list(params.values()), materialize_grads=True
    )
    found = dot(dict(zip(params, product, strict=True)), other)
    step = 1e-6
    ahead, behind = (
        gradient({n: (v + sign * step * vector[n]).detach().requires_grad_() for n, v in params.items()})
        for sign in (1, -1)
    )
    torch.testing.assert_close(found, (dot(ahead, other) - dot(behind, other)) / (2 * step), rtol=rtol, atol=atol)
