"""GELU and layer norm with second derivatives in closed form.

torch differentiates their first derivatives operation by operation, in some ten passes over memory for each activation
of each inner step. Both second derivatives are short formulas. The first derivative is torch's own kernel: the
gradient ``g`` of the output becomes ``J(x) g``, with ``J`` symmetric but for the weight of the norm. With ``u`` the
adjoint of that, its derivatives are ``∂/∂g: J(x)ᵀ u`` and ``∂/∂x: ∂(u · J(x) g)/∂x``, which are written out below.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_gelu_backward = torch.ops.aten.gelu_backward.default
_norm = torch.ops.aten.native_layer_norm.default
_norm_backward = torch.ops.aten.native_layer_norm_backward.default
_OF_INPUT = [True, False, False]


class Gelu(Function):
    """``x Φ(x)``, with ``Φ`` the normal distribution function (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return functional.gelu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return Gelu.apply(x), in_dims[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return GeluSlope.apply(grads[0], *ctx.saved_tensors)


class GeluSlope(Function):
    """``J(x) = Φ(x) + x φ(x)``, number by number, with the derivative ``φ(x) (2 - x²)``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, x: Tensor) -> Tensor:
        return _gelu_backward(grad, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        grad, x = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _by_torch(torch.ops.aten.gelu, grad, x, u)
        scale, half = 2 / math.sqrt(2 * math.pi), x.square().mul_(-0.5)
        # In place: what these operations take is the time to reach memory.
        slope = half.exp().mul_(half.mul_(scale).add_(scale))
        return _gelu_backward(u, x), (slope * u).mul_(grad)


class LayerNorm(Function):
    """``w x̂ + b`` with ``x̂ = r (x - mean x)``, ``r = (var x + ε)^-1/2`` (Ba et al. 2016, arXiv:1607.06450).

    ``w`` and ``b`` are frozen. Returns ``mean x`` and ``r`` too.
    """

    @staticmethod
    def forward(x: Tensor, shape: list[int], weight: Tensor, bias: Tensor | None, eps: float) -> Any:
        return _norm(x, shape, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, ctx.shape, weight, _, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, *output[1:], weight)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, *others: Any) -> Any:
        # Which dimensions are normalised is counted from the last.
        return LayerNorm.apply(x.movedim(in_dims[0], 0), *others), (0, 0, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return LayerNormSlope.apply(grads[0], *ctx.saved_tensors, ctx.shape, ctx.eps), None, None, None, None


class LayerNormSlope(Function):
    """``q = J(x) g = r (v - mean v - x̂ mean(v x̂))`` with ``v = w g``.

    With ``p`` the same of ``u`` in place of ``v``, its derivatives are ``w p``, and
    ``-r (x̂ mean(u q) + p mean(v x̂) + q mean(u x̂))``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, mean: Tensor, r: Tensor, weight: Tensor, shape: list[int], eps: float
    ) -> Tensor:
        return _norm_backward(grad, x, shape, mean, r, weight, None, _OF_INPUT)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.shape, ctx.eps = inputs
        ctx.save_for_backward(*tensors, output)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        grad, x, mean, r, weight, q = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Torch's own takes mean and r as constants in its third derivative.
            return *_by_torch(partial(_plain_norm, ctx.shape, weight, ctx.eps), grad, x, u), *[None] * 5
        axes = tuple(range(-len(ctx.shape), 0))
        p = _norm_backward(u, x, ctx.shape, mean, r, None, None, _OF_INPUT)[0]
        unit = (x - mean).mul_(r)
        of_q, of_u = (u * q).mean(axes, keepdim=True), (u * unit).mean(axes, keepdim=True)
        of_grad = (grad * weight).mul_(unit).mean(axes, keepdim=True)
        slope = (unit * of_q).addcmul_(p, of_grad).addcmul_(q, of_u).mul_(-r)
        return p.mul_(weight), slope, *[None] * 5


def _plain_norm(shape: list[int], weight: Tensor, eps: float, x: Tensor) -> Tensor:
    """Layer norm but for the bias, which drops out of every derivative."""
    axes = tuple(range(-len(shape), 0))
    apart = x - x.mean(axes, keepdim=True)
    return weight * apart * (apart.square().mean(axes, keepdim=True) + eps).rsqrt()


def _by_torch(function: Callable[[Tensor], Tensor], grad: Tensor, x: Tensor, u: Tensor) -> tuple[Tensor, ...]:
    """The derivatives of ``J(x) grad`` as torch has them, which can be differentiated again."""
    # Views, as the two may be one tensor; what is constant gets a derivative that nobody reads.
    grad, x = (each.view_as(each) if each.requires_grad else each.detach().requires_grad_() for each in (grad, x))
    (slope,) = torch.autograd.grad(function(x), x, grad, create_graph=True)
    return torch.autograd.grad(slope, (grad, x), u, create_graph=True)


for _form in (Gelu, GeluSlope, LayerNorm, LayerNormSlope):
    # torch asks for it in every call, and Python would work it out each time.
    _form.forward.__signature__ = inspect.signature(_form.forward)  # type: ignore[union-attr]


class ClosedForms(TorchFunctionMode):
    """A block in which these stand for torch's own, where a gradient with respect to the input alone is asked for.

    Values and first derivatives are the same to the bit.

    Args:
        hidden: what is differentiated does not show it, as within ``torch.vmap``: that it is, is taken for granted.
    """

    def __init__(self, hidden: bool = False) -> None:
        super().__init__()
        self.hidden = hidden

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.gelu and not kwargs and self._suits(args[0]):
            return Gelu.apply(args[0])
        if func is functional.layer_norm and self._suits(args[0]):
            x, shape, weight, bias, eps = _of_norm(*args, **(kwargs or {}))
            if weight is not None and self._is_frozen(weight) and (bias is None or self._is_frozen(bias)):
                return LayerNorm.apply(x, list(shape), weight, bias, eps)[0]
        return func(*args, **(kwargs or {}))

    def _suits(self, x: Tensor) -> bool:
        if not (x.requires_grad or self.hidden) or x.dtype not in (torch.float32, torch.float64):
            return False
        # Under autocast torch decides in which precision an operation is.
        return not torch.is_autocast_enabled(x.device.type)

    def _is_frozen(self, weight: Tensor) -> bool:
        # Fast weights are plain tensors.
        return not weight.requires_grad and (isinstance(weight, nn.Parameter) or not self.hidden)


def _of_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Any, Tensor | None, Tensor | None, float]:
    """The arguments of ``torch.nn.functional.layer_norm`` in order."""
    return input, normalized_shape, weight, bias, eps
