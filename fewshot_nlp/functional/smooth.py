"""GELU and layer norm whose second derivatives cost what they must.

A Hessian-vector product differentiates the backward pass. torch can do that for both, but falls back on some twenty
elementary operations each, every one a pass over memory: in a meta-step of BERT they take a quarter of the time. Here
the first derivative is torch's own fused kernel, and so is what the second one shares with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class _Gelu(Function):
    """``x Φ(x)``, with Φ and φ the standard normal distribution function and density."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return functional.gelu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _GeluBackward.apply(grads[0], *ctx.saved_tensors)


class _GeluBackward(Function):
    """``g`` times the slope ``Φ(x) + x φ(x)``; its derivative by ``x`` is ``g (2 - x²) φ(x)``."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
        slope = torch.ops.aten.gelu_backward(torch.ones_like(x), x)
        ctx.save_for_backward(grad, x, slope)
        return grad * slope

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        _no_third_derivative()
        (vector,), (grad, x, slope) = vectors, ctx.saved_tensors
        square = x * x
        bend = (square * -0.5).exp_().mul_(square.neg_().add_(2.0)).mul_(1 / math.sqrt(2 * math.pi))
        return vector * slope, bend.mul_(grad).mul_(vector)


class _LayerNorm(Function):
    """``x̂ w + b`` with ``x̂ = (x - mean) r``, for frozen ``w`` and ``b``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        out, mean, inverse = torch.ops.aten.native_layer_norm(x, [size], weight, bias, eps)
        ctx.save_for_backward(x, mean, inverse, weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _LayerNormBackward.apply(grads[0], *ctx.saved_tensors), None, None, None, None


class _LayerNormBackward(Function):
    """``r P(g w)``, where ``P(u) = u - mean(u) - x̂ mean(u x̂)`` is symmetric.

    With ``dx̂ = r P(dx)`` and ``dr = -r² mean(x̂ dx)``, its pullback of ``v`` is ``w r P(v)`` by ``g``. By ``x`` it is,
    with ``u = g w``, ``c_u = mean(u x̂)`` and ``c_v`` alike,
    ``r P(-r (c_v u + c_u v)) - r² (mean(u v) - mean(u) mean(v) - c_u c_v) x̂``.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(grad, x, mean, inverse, weight)
        return _project(grad, x, mean, inverse, weight)

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor) -> tuple[Tensor | None, ...]:
        _no_third_derivative()
        (v,), (grad, x, mean, inverse, weight) = vectors, ctx.saved_tensors
        u, normal = grad * weight, (x - mean) * inverse
        c_u, c_v = _mean_product(u, normal), _mean_product(v, normal)
        inside = (u * c_v).addcmul_(v, c_u).mul_(-inverse)
        spread = _mean_product(u, v) - u.mean(-1, keepdim=True) * v.mean(-1, keepdim=True) - c_u * c_v
        by_x = _project(inside, x, mean, inverse, None) - normal.mul_(spread * inverse * inverse)
        return _project(v, x, mean, inverse, None) * weight, by_x, None, None, None


def _no_third_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("These kernels have two derivatives and no third. Call the module outside the block.")


def _project(grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None) -> Tensor:
    """``r P(g w)``, by the kernel of layer norm's backward pass."""
    shape = [x.shape[-1]]
    return torch.ops.aten.native_layer_norm_backward(
        grad.contiguous(), x, shape, mean, inverse, weight, None, [True, False, False]
    )[0]


def _mean_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)[..., None] / a.shape[-1]


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return _Gelu.apply(x) if approximate == "none" else functional.gelu(x, approximate=approximate)


def _layer_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    learned = any(each is not None and each.requires_grad for each in (weight, bias))
    if weight is not None and not learned and len(normalized_shape) == 1 and x.dtype == weight.dtype:
        return _LayerNorm.apply(x.contiguous(), normalized_shape[0], weight, bias, eps)
    return functional.layer_norm(x, normalized_shape, weight, bias, eps)


_KERNELS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    functional.gelu: _gelu,
    functional.layer_norm: _layer_norm,
}


class TwiceDifferentiable(TorchFunctionMode):
    """A block in which modules, whatever they are, use these kernels where they would use torch's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _KERNELS.get(func, func)(*args, **(kwargs or {}))
