"""The layers below the first trained one: run once for a text or image, not once an inner step.

Where an adapter changes the top layers alone, what flows into them never changes. Most of the arithmetic of inner
loops, and of episodes that come back to the same texts or images, is then below, and needed once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewshot_nlp.functional.call import inputs_of
from fewshot_nlp.functional.store import TensorStore

#: The shape that texts go through in: rows, and what their tokens are a multiple of. More rows take less time for each
#: text, and more time for one that has no company.
ROWS, STEP = 8, 8


class _Given(nn.Module):
    """Stands for a layer below, where what the top of the trunk hands on is known."""

    def __init__(self, layer: nn.Module, output: Any, begun: list[bool]) -> None:
        super().__init__()
        # Past nn.Module's own registration: the layer's parameters are not this module's.
        self.__dict__.update(layer=layer, output=output, begun=begun)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.begun:
            raise RuntimeError(
                f"{type(self.layer).__name__} runs again after a layer above it, which a trunk cannot stand for. Train "
                f"all layers of the adapter, or none below the first trained one."
            )
        return self.output

    def __getattr__(self, name: str) -> Any:
        # Some models ask their layers what kind of attention they have.
        return getattr(self.__dict__["layer"], name)


@dataclass
class Top:
    """What the top of a trunk was seen to hand on. A copy has seen no weights.

    Attributes:
        works: hidden states and nothing else, which can be kept.
        empty: how many empty places stand behind them; ``None`` where they are handed on by themselves.
        weights: those that it was last made by, with buffers, and where they lay in memory.
        moves: how often these lay elsewhere than before.
    """

    works: bool = True
    empty: int | None = None
    weights: tuple[list[Tensor], list[int]] = field(default_factory=lambda: ([], []))
    moves: int = 0

    def __reduce__(self) -> tuple[type[Top], tuple[bool, int | None]]:
        return Top, (self.works, self.empty)


class Trunk:
    """The first ``depth`` of a module's layers.

    On a CPU texts go through in groups of one shape, ``ROWS`` texts by a multiple of ``STEP`` tokens, filled up with
    copies where they are few. What becomes of a row of such a shape is to the bit the same whatever the other rows are,
    while shapes differ in the last bit; so what is kept depends on nothing but the text, and a resumed run is the run
    that was interrupted. Each image goes through alone, unless what it becomes depends on the others of its batch
    (``alone=False``). Elsewhere, where calls cost more than arithmetic, batches are kept whole. What is kept is found
    by the state of the weights, too, so that it is never stale while the module keeps its parts and nothing is written
    past torch, into ``.data``; after that, ``forget``.

    Args:
        module: the backbone.
        layers: its stack.
        depth: how many of them are not trained.
        alone: whether an image may go through alone.
        longest: text that the module takes, in tokens; ``None`` where it takes any.

    Attributes:
        known: what is kept.
        top: what became of the last text; with ``known``, all that the trunks of twins share.
    """

    def __init__(
        self, module: nn.Module, layers: nn.ModuleList, depth: int, alone: bool = True, longest: int | None = None
    ) -> None:
        self.module, self.layers, self.depth, self.alone, self.longest = module, layers, depth, alone, longest
        self.known, self.top = TensorStore(), Top()
        above = {id(part) for layer in list(layers)[depth:] for part in layer.modules()}
        held: list[dict[str, Any]] = [part._buffers for part in module.modules()]
        held = [part._parameters for part in module.modules() if id(part) not in above] + held
        # By their places: a module that is moved has other buffers, and one that is loaded may have other weights.
        self._weights = [(own, name) for own in held for name in own]

    @property
    def works(self) -> bool:
        """Until a layer is seen to hand on more than hidden states, which is not kept."""
        return self.top.works

    @contextmanager
    def skipped(
        self, inputs: dict[str, Tensor], precision: str = "", lay: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[None]:
        """A block in which the module, called with ``inputs``, starts at the first trained layer.

        Args:
            inputs: of the call; or what they were before ``lay``.
            precision: names what else decides how the trunk computes, such as autocast.
            lay: how the call lays out what is ``[n, length, ...]`` in ``inputs``, if in another way.
        """
        hidden = self.read(inputs, precision)
        if hidden is None:
            yield
            return
        with self.starting(lay(hidden) if lay else hidden):
            yield

    @contextmanager
    def starting(self, hidden: Tensor) -> Iterator[None]:
        """A block in which the module starts at the first trained layer, which is given ``hidden``."""
        output = hidden if self.top.empty is None else (hidden, *[None] * self.top.empty)
        below, begun = [self.layers[i] for i in range(self.depth)], list[bool]()
        hook = self.layers[self.depth].register_forward_pre_hook(lambda *_: begun.append(True))
        for i, layer in enumerate(below):
            self.layers[i] = _Given(layer, output, begun)
        try:
            yield
        finally:
            hook.remove()
            for i, layer in enumerate(below):
                self.layers[i] = layer

    def read(self, inputs: dict[str, Tensor], precision: str = "") -> Tensor | None:
        """The hidden states that the top of the trunk hands on, run for what is not known; ``None`` where it hands on
        more."""
        return self._output(inputs, self._address(precision)) if self.works else None

    def forget(self) -> None:
        """Free what is kept, and run every text anew."""
        self.known = TensorStore()

    def _address(self, precision: str) -> bytes:
        """What weights and buffers are now, cheaply: where they lie, and how often they were written to, which torch
        does not count where ``.data`` is written to."""
        weights = [value for own, name in self._weights if (value := own[name]) is not None]
        places, top = [value.data_ptr() for value in weights], self.top
        if places != top.weights[1]:
            # Those before are kept alive until here, so that no others can have come to lie where they did.
            top.weights, top.moves = ([value.detach() for value in weights], places), top.moves + 1
        first, writes = weights[0], sum(value._version for value in weights)
        return f"{top.moves} {first.dtype}{first.device}{writes}{precision}|".encode()

    def _output(self, inputs: dict[str, Tensor], address: bytes) -> Tensor | None:
        """The hidden states that the top of the trunk hands on; ``None`` where it hands on more."""
        mask = inputs.get("attention_mask")
        if mask is None and self.alone and all(tensor.device.type == "cpu" for tensor in inputs.values()):
            n = len(next(iter(inputs.values())))
            images = [self._of_batch({name: t[i : i + 1] for name, t in inputs.items()}, address) for i in range(n)]
            kept = [image for image in images if image is not None]
            return torch.cat(kept) if len(kept) == n else None
        if mask is None or mask.ndim != 2 or mask.device.type != "cpu" or not _padded_behind(mask):
            return self._of_batch(inputs, address)
        lengths = mask.sum(dim=1).tolist()
        texts = [{name: t[i : i + 1, :n] for name, t in inputs.items()} for i, n in enumerate(lengths)]
        rows = self._of_texts(texts, lengths, address)
        if rows is None:
            return None
        hidden = rows[0].new_zeros(len(rows), mask.shape[1], rows[0].shape[-1])
        for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            hidden[i, :n] = row[0]
        return hidden

    def _of_texts(self, texts: list[dict[str, Tensor]], lengths: list[int], address: bytes) -> list[Tensor] | None:
        """What the top of the trunk makes of each text, ``[1, length, size]``; ``None`` if it is no such tensor."""
        names = [_name(text, address) for text in texts]
        found = {name: self.known.get(name) for name in names}
        # A module may take a short cut where nothing is masked: texts that fill their shape have one of their own.
        missing: dict[tuple[int, bool], dict[bytes, int]] = {}
        for i, (name, n) in enumerate(zip(names, lengths, strict=True)):
            width = -(-n // STEP) * STEP
            width = width if self.longest is None else min(width, self.longest)
            if found[name] is None:
                missing.setdefault((width, n == width), {})[name] = i
        for (width, _), places in missing.items():
            waiting = list(places.items())
            for first in range(0, len(waiting), ROWS):
                group = waiting[first : first + ROWS]
                rows = [widened(texts[i], width) for _, i in group]
                rows += rows[:1] * (ROWS - len(rows))
                output = self._run({each: torch.cat([row[each] for row in rows]) for each in rows[0]})
                if output is None or output.shape[:2] != (ROWS, width):
                    self.top.works = False
                    return None
                for row, (name, i) in enumerate(group):
                    found[name] = kept = output[row : row + 1, : lengths[i]].clone()
                    self.known.put(name, kept)
        return [known for name in names if (known := found[name]) is not None]

    def _of_batch(self, inputs: dict[str, Tensor], address: bytes) -> Tensor | None:
        name = _name(inputs, address)
        found = self.known.get(name)
        if found is None and (found := self._run(inputs)) is not None:
            self.known.put(name, found)
        return found

    def _run(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """The hidden states that the top of the trunk hands on."""
        handed = self._handed_on(inputs)
        first, *rest = handed if isinstance(handed, tuple) else (handed,)
        if not torch.is_tensor(first) or any(each is not None for each in rest):
            self.top.works = False
            return None
        self.top.empty = len(rest) if isinstance(handed, tuple) else None
        return first

    def _handed_on(self, inputs: dict[str, Tensor]) -> Any:
        outputs: list[Any] = []
        # Albert runs a layer several times before it goes on to the next: its last output counts.
        hook = self.layers[self.depth - 1].register_forward_hook(lambda layer, args, output: outputs.append(output))
        # What is kept outlives the block it is made in, and is recorded later.
        with torch.inference_mode(False), torch.no_grad():
            given = {name: t.clone() if t.is_inference() else t for name, t in inputs.items()}
            try:
                inputs_of(self.layers[self.depth], lambda: self.module(**given))
            finally:
                hook.remove()
        return outputs[-1]


def _padded_behind(mask: Tensor) -> bool:
    """Whether each text has tokens, and all of its padding is behind them."""
    return bool(mask[:, 0].all()) and bool((mask[:, 1:] <= mask[:, :-1]).all())


def _name(inputs: dict[str, Tensor], address: bytes) -> bytes:
    """What ``inputs`` are known by. An image is too large to be its own name."""
    for name, tensor in inputs.items():
        content = hashlib.sha256(tensor.cpu().contiguous().numpy().data).digest()
        address += f"{name}{tuple(tensor.shape)}".encode() + content
    return address


def widened(texts: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """Texts ``[n, length]``, padded behind, as rows of ``width`` tokens; what is added is masked."""
    wide: dict[str, Tensor] = {}
    for name, tensor in texts.items():
        added = tensor[:, -1:].expand(-1, width - tensor.shape[1], *tensor.shape[2:])
        wide[name] = torch.cat([tensor, added * 0 if name == "attention_mask" else added], dim=1)
    return wide


def find_layers(module: nn.Module) -> nn.ModuleList | None:
    """The stack of like layers that makes up most of ``module``, if it has one."""
    stacks = [
        part
        for part in module.modules()
        if isinstance(part, nn.ModuleList) and len(part) > 1 and len({type(layer) for layer in part}) == 1
    ]
    return max(stacks, key=lambda stack: sum(value.numel() for value in stack.parameters()), default=None)


def find_trunk(
    module: nn.Module, trained: Sequence[str], alone: bool = True, longest: int | None = None
) -> Trunk | None:
    """The layers of ``module`` below every parameter in ``trained``, if there are any; the rest as of ``Trunk``.

    ``None`` where a parameter outside the layers is trained, such as an embedding or a soft prompt.
    """
    for name, layers in module.named_modules():
        if not isinstance(layers, nn.ModuleList) or len({type(layer) for layer in layers}) != 1:
            continue
        if not trained or not all(each.startswith(f"{name}.") for each in trained):
            continue
        depth = min(int(each.removeprefix(f"{name}.").split(".")[0]) for each in trained)
        return Trunk(module, layers, depth, alone, longest) if depth else None
    return None
