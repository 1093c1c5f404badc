"""The layers below the first trained one: run once for a batch, not once an inner step.

Where an adapter changes the top layers alone, what flows into them never changes. Most of an inner loop's arithmetic is
then below, and needed once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: What a trunk remembers, in bytes.
MAX_BYTES = 512 * 2**20


class _Reached(Exception):
    """Ends a forward pass at the top of the trunk."""

    def __init__(self, output: Any) -> None:
        self.output = output


class _Given(nn.Module):
    """Stands for a layer whose output is known."""

    def __init__(self, layer: nn.Module, output: Any) -> None:
        super().__init__()
        # Past nn.Module's own registration: the layer's parameters are not this module's.
        self.__dict__.update(layer=layer, output=output)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output

    def __getattr__(self, name: str) -> Any:
        # Some models ask their layers what kind of attention they have.
        return getattr(self.__dict__["layer"], name)


class Trunk:
    """The first ``depth`` of a module's layers.

    Batches are remembered whole: rows computed in other company may differ in their last bit, and a resumed run would
    then not be the run that was interrupted.
    """

    def __init__(self, module: nn.Module, layers: nn.ModuleList, depth: int, max_bytes: int = MAX_BYTES) -> None:
        self.module, self.layers, self.depth, self.max_bytes = module, layers, depth, max_bytes
        self._known: OrderedDict[bytes, Any] = OrderedDict()

    @contextmanager
    def skipped(self, inputs: dict[str, Tensor]) -> Iterator[None]:
        """A block in which the module, called with ``inputs``, starts at the first trained layer.

        Until ``forget`` is called, neither the trunk's weights nor the precision it computes in may change.
        """
        output = self._output(inputs)
        below = [self.layers[i] for i in range(self.depth)]
        for i, layer in enumerate(below):
            self.layers[i] = _Given(layer, output)
        try:
            yield
        finally:
            for i, layer in enumerate(below):
                self.layers[i] = layer

    def forget(self) -> None:
        """Free what is remembered, and run every batch anew."""
        self._known.clear()

    def _output(self, inputs: dict[str, Tensor]) -> Any:
        parts = []
        for name, tensor in inputs.items():
            parts += [f"{name}{tuple(tensor.shape)}{tensor.device}".encode(), tensor.cpu().numpy().tobytes()]
        address = b"|".join(parts)
        if address not in self._known:
            self._known[address] = self._run(inputs)
            while sum(map(_bytes, self._known.values())) > self.max_bytes and len(self._known) > 1:
                self._known.popitem(last=False)
        self._known.move_to_end(address)
        return self._known[address]

    def _run(self, inputs: dict[str, Tensor]) -> Any:
        def reached(layer: nn.Module, args: Any, output: Any) -> None:
            raise _Reached(output)

        hook = self.layers[self.depth - 1].register_forward_hook(reached)
        # What is kept outlives the block it is made in, and is recorded later.
        with torch.inference_mode(False), torch.no_grad():
            try:
                self.module(**{name: t.clone() if t.is_inference() else t for name, t in inputs.items()})
            except _Reached as top:
                return top.output
            finally:
                hook.remove()
        raise RuntimeError(f"{type(self.module).__name__} does not run its own layers.")


def _bytes(output: Any) -> int:
    """Size of what a layer returns: a tensor, or a tuple that may hold some."""
    return sum(each.nbytes for each in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(each))


def find_trunk(module: nn.Module, trained: Sequence[str]) -> Trunk | None:
    """The layers of ``module`` below every parameter in ``trained``, if there are any.

    ``None`` where a parameter outside the layers is trained, such as an embedding or a soft prompt.
    """
    for name, layers in module.named_modules():
        if not isinstance(layers, nn.ModuleList) or len({type(layer) for layer in layers}) != 1:
            continue
        if not trained or not all(each.startswith(f"{name}.") for each in trained):
            continue
        depth = min(int(each.removeprefix(f"{name}.").split(".")[0]) for each in trained)
        return Trunk(module, layers, depth) if depth else None
    return None
