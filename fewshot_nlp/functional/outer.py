"""The meta-gradient of an inner loop, exact, at a memory that does not grow with its steps.

A task's adaptation is a composition of links. With meta-parameters θ, and a carry ``c_k`` of fast weights and the
rule's memory::

    c_1 = a_0(θ),   c_{k+1} = a_k(θ, c_k),   meta-loss  M(θ) = Σ_k w_k Q(θ, c_k)

where ``a_0`` makes the start and takes the first step, and every link holds one inner gradient
``∇S(φ_k)``. Reverse-mode differentiation of all of it at once keeps the graph of every step: memory grows with K
(MAML, Finn et al. 2017). Yet the chain rule needs one link at a time. With the adjoint ``λ_K = ∂M/∂c_K``::

    λ_k   = (∂a_k/∂c_k)ᵀ λ_{k+1} + w_k ∂Q/∂c_k
    dM/dθ = Σ_k (∂a_k/∂θ)ᵀ λ_{k+1} + w_k ∂Q/∂θ

For gradient descent, ``a_k = φ - α∇S(φ)``, the first line is ``λ_k = λ_{k+1} - α ∇²S(φ_k) λ_{k+1}``: one
Hessian-vector product a step. So the loop is run once without any graph, keeping the carries alone: for LoRA or a soft
prompt they are thousands of times smaller than a step's graph. Then each link is run again, last to first, and its
transposed Jacobian is applied to the adjoint. That is checkpointed backpropagation (Griewank and Walther 2000; Chen et
al. 2016, arXiv:1604.06174) with the inner steps as its checkpoints, as in MixFlow-MG (Kemaev et al., ICML 2025,
arXiv:2505.00793). It costs one more evaluation of each inner gradient but the last; ``chunk`` links at a time share a
graph, and with a chunk of all of them nothing is run twice and this is the plain unrolled loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fewshot_nlp.functional.call import full_precision
from fewshot_nlp.types import Params


class Carry(NamedTuple):
    """What one link hands to the next: fast weights, and whatever else it must not compute again.

    Attributes:
        fast: fast weights by name.
        slots: the update rule's memory, and values that no step changes.
    """

    fast: dict[str, Tensor]
    slots: dict[str, Tensor]

    def map(self, function: Callable[[Tensor], Tensor]) -> Carry:
        """``function`` of every tensor."""
        return Carry(*({name: function(value) for name, value in part.items()} for part in self))

    def tensors(self) -> list[Tensor]:
        return [*self.fast.values(), *self.slots.values()]


class Link(Protocol):
    """One part of an adaptation."""

    def __call__(self, params: Params, carry: Carry | None, record: bool) -> Carry:
        """The next carry, from the last one; the first link is given none.

        With ``record`` it is a differentiable function of both arguments; without, its graph is not needed.
        """
        ...


#: ``loss(params, carry)``: the query loss, and what the caller wants to see beside it.
Loss = Callable[[Params, Carry], tuple[Tensor, Tensor]]


class Outcome(NamedTuple):
    """A meta-gradient by name; the last loss, and what came beside it, detached."""

    grads: dict[str, Tensor]
    loss: Tensor
    extra: Tensor


def leaf(tensor: Tensor) -> Tensor:
    """A leaf of the same values, to differentiate with respect to."""
    # What was made in inference mode cannot be recorded; a copy can.
    return (tensor.clone() if tensor.is_inference() else tensor).detach().requires_grad_()


def leaves(params: Params) -> dict[str, Tensor]:
    """Leaves with the values of ``params``."""
    return {name: leaf(value) for name, value in params.items()}


def gradient(
    outputs: Tensor | Sequence[Tensor], sources: Sequence[Tensor], pulls: Any = None, **options: Any
) -> tuple[Tensor, ...]:
    """``torch.autograd.grad`` outside of autocast, under which the backward pass would round to half precision what the
    forward pass did not: sums whose terms cancel lose most of their digits there.

    What does not depend on a source gives it a gradient of zero.
    """
    with full_precision(sources[0]):
        return torch.autograd.grad(outputs, sources, pulls, materialize_grads=True, **options)


def adapt(links: Sequence[Link], params: Params, carry: Carry | None = None) -> Carry:
    """The carry after ``links``, from ``carry`` where the first of them is not the start, without a graph."""
    with torch.inference_mode(False), torch.enable_grad():
        return _through(links, leaves(params), carry)


def _through(links: Sequence[Link], theta: Params, carry: Carry | None) -> Carry:
    for link in links:
        carry = link(theta, carry and carry.map(leaf), False).map(Tensor.detach)
    assert carry is not None, "an adaptation has one link or more"
    return carry


def meta_gradient(
    links: Sequence[Link],
    loss: Loss,
    params: Params,
    *,
    chunk: int | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Outcome:
    """The exact gradient of the meta-loss with respect to ``params``.

    Args:
        links: one or more.
        loss: query loss at a carry.
        params: θ, by name.
        chunk: links whose graphs are in memory together; all of them if not given.
        weights: of the loss after each link (multi-step loss, MAML++); by default 1 after the last and 0 else.
        seed: of random numbers that links draw, such as dropout's: they draw the same ones when they are run again.
    """
    count = len(links)
    weights = [0.0] * (count - 1) + [1.0] if weights is None else weights
    size = min(chunk or count, count)
    # The first chunk is the short one, as the last is never run again.
    starts = [0, *range(count % size or size, count, size)]
    chunks = [range(start, end) for start, end in zip(starts, [*starts[1:], count], strict=True)]
    with torch.inference_mode(False), torch.enable_grad(), drawing(params, seed):
        loss = _seeded(loss, params, seed * (count + 1))
        links = [_seeded(link, params, seed * (count + 1) + k) for k, link in enumerate(links, start=1)]

        theta = leaves(params)
        befores: list[Carry | None] = [None]
        for part in chunks[:-1]:
            befores.append(_through([links[k] for k in part], theta, befores[-1]))

        grads = {name: torch.zeros_like(value) for name, value in params.items()}
        adjoint: list[Tensor] = []
        for part, before in zip(reversed(chunks), reversed(befores), strict=True):
            # Where a graph ends: θ, and the carry that the chunk begins with.
            theta, inside = leaves(params), before and before.map(leaf)
            carry, losses = inside, []
            for k in part:
                carry = links[k](theta, carry, True)
                if weights[k] or k == count - 1:
                    value, extra = loss(theta, carry)
                    losses.append(weights[k] * value)
                    if k == count - 1:
                        final = value.detach(), extra.detach()
            assert carry is not None
            ends = [*losses, *(carry.tensors() if adjoint else [])]
            pulls = [*map(torch.ones_like, losses), *adjoint]
            reached = [(end, pull) for end, pull in zip(ends, pulls, strict=True) if end.requires_grad]
            sources = [*theta.values(), *(inside.tensors() if inside else [])]
            found = _pullback(reached, sources)
            for name, grad in zip(theta, found, strict=False):
                grads[name] += grad
            adjoint = found[len(theta) :]
    return Outcome(grads, *final)


def _pullback(reached: list[tuple[Tensor, Tensor]], sources: list[Tensor]) -> list[Tensor]:
    """Sum of the vector-Jacobian products of ``(output, vector)`` pairs with respect to ``sources``."""
    if not reached:
        return [torch.zeros_like(source) for source in sources]
    outputs, vectors = zip(*reached, strict=True)
    return list(gradient(outputs, sources, vectors))


def _seeded(function: Callable[..., Any], params: Params, seed: int) -> Callable[..., Any]:
    """``function`` that draws the same random numbers in every call."""

    def call(*args: Any) -> Any:
        _seed(params, seed)
        return function(*args)

    return call


def _seed(params: Params, seed: int) -> None:
    """Seed the generators of the devices that ``params`` are on, and of the CPU."""
    # torch.manual_seed would seed all devices, and formats a stack trace where CUDA was not used yet, which takes
    # longer than a small network.
    torch.default_generator.manual_seed(seed)
    for device in _gpus(params):
        torch.cuda.default_generators[device.index].manual_seed(seed)


@contextmanager
def drawing(params: Params, seed: int) -> Iterator[None]:
    """A block whose random numbers follow from ``seed``, on the devices that ``params`` are on and the CPU, and after
    which torch's generators are as they were."""
    with torch.random.fork_rng(devices=list(_gpus(params))):
        _seed(params, seed)
        yield


def _gpus(params: Params) -> set[torch.device]:
    return {value.device for value in params.values() if value.device.type == "cuda"}
