"""The meta-gradient at the end of an inner loop, whatever path led there: implicit differentiation.

iMAML (Rajeswaran et al., NeurIPS 2019, arXiv:1909.04630) pulls the fast weights towards their start φ₀ and takes the
loop for converged::

    φ* = argmin_φ S(φ, θ) + λ/2 |φ - φ₀|²,   so that   ∇S(φ*, θ) + λ (φ* - φ₀) = 0

Differentiating the condition gives, with ``H = ∇²S(φ*)`` and ``v = ∂Q/∂φ*``, one linear system a task::

    (H + λI) u = v,   dQ/dφ₀ = λ u,   dQ/dθ = ∂Q/∂θ - (∂∇S/∂θ)ᵀ u

which conjugate gradients solve with Hessian-vector products on one graph. Time and memory do not depend on the steps
of the inner loop; the answer is as exact as the loop has converged and the system is solved. Weight decay of the loop
is part of ``S``. Fast weights that the loop leaves at their start are no part of φ: what hangs on them hangs on θ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewshot_nlp.functional.call import full_precision
from fewshot_nlp.functional.outer import Outcome, gradient, leaves
from fewshot_nlp.types import Params

Fast = dict[str, Tensor]


def conjugate_gradient(product: Callable[[Tensor], Tensor], vector: Tensor, steps: int, tolerance: float) -> Tensor:
    """Solve ``A x = vector`` for a symmetric positive definite ``A`` given as ``product(x) = A x``.

    Hestenes and Stiefel 1952. Ends after ``steps``, at a residual of ``tolerance`` times ``vector``, or where ``A``
    shows a direction that is not positive, with what was found until then.
    """
    # Rounded by autocast, its scalar products send it astray.
    with full_precision(vector):
        x, residual = torch.zeros_like(vector), vector.clone()
        direction, square = residual, residual @ residual
        limit = tolerance**2 * square
        for _ in range(steps):
            if square <= limit:
                break
            image = product(direction)
            curvature = direction @ image
            if curvature <= 0:
                break
            step = square / curvature
            x, residual = x + step * direction, residual - step * image
            before, square = square, residual @ residual
            direction = residual + (square / before) * direction
    return x


def implicit_gradient(
    start: Callable[[Params], Fast],
    slope: Callable[[Params, Fast], Fast],
    loss: Callable[[Params, Fast], tuple[Tensor, Tensor]],
    params: Params,
    adapted: Fast,
    *,
    moving: Sequence[str],
    proximal: float,
    steps: int,
    tolerance: float = 1e-10,
) -> Outcome:
    """The gradient of the query loss at ``adapted`` with respect to ``params``.

    Args:
        start: φ₀ as a function of θ.
        slope: ∇S as a function of θ and all fast weights, differentiable.
        loss: query loss at θ and φ, and what the caller wants to see beside it.
        params: θ, by name.
        adapted: where the inner loop ended, the fast weights that it leaves at their start included.
        moving: names of φ, the fast weights that the loop moves; one at least.
        proximal: λ.
        steps, tolerance: at which conjugate gradients end.
    """
    with torch.inference_mode(False), torch.enable_grad():
        theta, fast = leaves(params), leaves(adapted)
        phi, still = ({n: v for n, v in fast.items() if (n in moving) == moves} for moves in (True, False))
        value, extra = loss(theta, fast)
        sources = [*phi.values(), *theta.values(), *still.values()]
        direct = gradient(value, sources)

        # One graph of the inner gradient serves every product with the Hessian.
        sizes = [tensor.numel() for tensor in phi.values()]

        def shaped(vector: Tensor) -> list[Tensor]:
            return [part.view_as(t) for part, t in zip(vector.split(sizes), phi.values(), strict=True)]

        def flat(tensors: Sequence[Tensor]) -> Tensor:
            return torch.cat([tensor.reshape(-1) for tensor in tensors])

        slopes = slope(theta, fast)
        slope_of_phi = [slopes[name] for name in phi]

        def product(vector: Tensor) -> Tensor:
            image = gradient(slope_of_phi, [*phi.values()], shaped(vector), retain_graph=True)
            return flat(image) + proximal * vector

        solution = conjugate_gradient(product, flat(direct[: len(phi)]), steps, tolerance)
        through = gradient(slope_of_phi, sources[len(phi) :], shaped(solution))
        own = [seen - less for seen, less in zip(direct[len(phi) :], through, strict=True)]
        first = start(theta)
        pulls = [*shaped(proximal * solution), *own[len(theta) :]]
        back = gradient([first[name] for name in (*phi, *still)], [*theta.values()], pulls)
        grads = {name: value + by_start for name, value, by_start in zip(theta, own, back, strict=False)}
    return Outcome(grads, value.detach(), extra.detach())
