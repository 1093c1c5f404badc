"""Several short texts in one row, so that hardly any arithmetic is spent on padding.

Texts of a row do not see each other: attention scores between them are masked, and positions begin anew with each.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewshot_nlp.models.adapters import bare_model
from fewshot_nlp.models.backbone import ATTENTION

#: Architectures whose tokens meet in attention alone, each with all of its text, and that take positions as they are
#: given. In others a window of attention, or positions of the backbone's own, would be lost.
PACKED = frozenset({"bert", "electra", "gpt2", "llama"})
#: What a backbone may be given of a text: one number a token.
INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids"})
#: More texts take longer to be packed than it saves.
MOST = 512
#: What rows may hold, in lengths of the longest text.
CAPACITIES = (1.0, 1.5, 2.0)
#: In rows of so many tokens attention, its softmax above all, takes as long as all that is done token by token.
ATTENTION_COST = 256
#: What packing must save to be worth its own trouble.
WORTH = 0.05


@dataclass(frozen=True)
class Packing:
    """Where the tokens of ``n`` texts of at most ``length`` tokens go.

    Attributes:
        source: ``[rows, capacity]``, the place in ``[n * length]`` that a token comes from; 0 in empty places.
        text: ``[rows, capacity]``, the text that a token is of; -1 in empty places.
        positions: ``[rows, capacity]``, its place in the text.
        target: ``[n, length]``, the place in ``[rows * capacity]`` where each token went; 0 of padding.
    """

    source: Tensor
    text: Tensor
    positions: Tensor
    target: Tensor

    def pack(self, tensor: Tensor) -> Tensor:
        """``[rows, capacity, ...]`` from ``[n, length or more, ...]``."""
        return tensor[:, : self.target.shape[1]].flatten(0, 1)[self.source]

    def unpack(self, tensor: Tensor) -> Tensor:
        """``[n, length, ...]`` from ``[rows, capacity, ...]``; padding is some token's."""
        return tensor.flatten(0, 1)[self.target]

    def inputs(self, inputs: dict[str, Tensor], dtype: torch.dtype, causal: bool) -> dict[str, Tensor]:
        """What a backbone is given for all texts at once.

        Args:
            inputs: ``INPUTS``, each ``[n, length or more]``.
            dtype: of the mask, ``[rows, 1, capacity, capacity]``, which is added to attention scores.
            causal: a token sees those before it alone.
        """
        # Empty places see each other, so that no softmax is over nothing.
        seen = self.text[:, :, None] == self.text[:, None, :]
        if causal:
            seen &= self.positions[:, :, None] >= self.positions[:, None, :]
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        packed = {name: self.pack(tensor) for name, tensor in inputs.items()}
        return {**packed, "attention_mask": mask[:, None], "position_ids": self.positions}


def packing_for(inputs: dict[str, Tensor]) -> Packing | None:
    """How texts are packed; ``None`` where a row for each is as cheap, a text is empty or has a hole, or there is more
    to them than ``INPUTS``.

    Args:
        inputs: of a backbone, with padding behind the texts.
    """
    mask = inputs["attention_mask"]
    whole = bool(mask[:, 0].all()) and torch.equal(mask.cumprod(dim=1), mask.long())
    if not whole or len(mask) > MOST or not inputs.keys() <= INPUTS:
        return None
    sizes = mask.sum(dim=1)
    lengths = sizes.tolist()
    longest = max(lengths)
    best, cost = None, (1 - WORTH) * len(lengths) * _price(longest)
    for factor in CAPACITIES:
        capacity = int(factor * longest)
        rows, starts = _fill(lengths, capacity)
        if (max(rows) + 1) * _price(capacity) < cost:
            best, cost = (capacity, rows, starts), (max(rows) + 1) * _price(capacity)
    if best is None:
        return None
    capacity, rows, starts = best
    text = torch.arange(len(lengths)).repeat_interleave(sizes)
    position = torch.arange(len(text)) - (sizes.cumsum(0) - sizes)[text]
    place = (torch.tensor(rows) * capacity + torch.tensor(starts))[text] + position
    empty = torch.zeros(max(rows) + 1, capacity, dtype=torch.long)

    def laid(values: Tensor, fill: int = 0) -> Tensor:
        return (empty + fill).flatten().index_copy(0, place, values).view_as(empty)

    target = torch.zeros(len(lengths), longest, dtype=torch.long)
    target[text, position] = place
    return Packing(laid(text * longest + position), laid(text, -1), laid(position), target)


def _price(capacity: int) -> float:
    """What a row takes, in tokens that attend to nothing."""
    return capacity * (1 + capacity / ATTENTION_COST)


def _fill(lengths: list[int], capacity: int) -> tuple[list[int], list[int]]:
    """Row and start of each text: the longest goes first, into the first row that has room."""
    used: list[int] = []
    rows, starts = [0] * len(lengths), [0] * len(lengths)
    for each in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((i for i, taken in enumerate(used) if taken + lengths[each] <= capacity), len(used))
        if row == len(used):
            used.append(0)
        rows[each], starts[each] = row, used[row]
        used[row] += lengths[each]
    return rows, starts


def can_pack(module: Any) -> bool:
    """Whether rows of several texts are the same to a backbone, with its adapter, as a row for each."""
    bare = bare_model(module)
    adapters = getattr(module, "peft_config", {}).values()
    return (
        bare.config.model_type in PACKED
        and bare.config._attn_implementation == ATTENTION
        and "position_ids" in inspect.signature(bare.forward).parameters
        and next(bare.parameters()).dtype in (torch.float32, torch.float64)
        # Virtual tokens stand in front of a row, not of a text.
        and not any(each.is_prompt_learning or each.is_adaption_prompt for each in adapters)
    )
