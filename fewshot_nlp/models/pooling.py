"""From one vector a token to one vector a text."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_causal(module: nn.Module) -> bool:
    """Whether a token's state follows from the tokens before it alone, as in a decoder: only the last has read all."""
    return any(getattr(part, "is_causal", False) for part in module.modules())


def find_pooling(pooling: str, module: nn.Module) -> str:
    """What ``"auto"`` means for a backbone: ``"last"`` of a decoder, ``"mean"`` of anything else."""
    if pooling != "auto":
        return pooling
    return "last" if is_causal(module) else "mean"


def right_padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same texts with their padding behind them, wherever it stood.

    Every backbone counts positions from the first token then, padding is nothing that a decoder has read, and a soft
    prompt stands right before its text: none of that holds of padding in front.

    Args:
        inputs: each ``[n, length]``, ``attention_mask`` among them.
    """
    mask = inputs["attention_mask"]
    # On an accelerator, looking at the mask would wait for it.
    if mask.device.type == "cpu" and mask[:, 0].all():
        return inputs
    length = mask.shape[1]
    places = (torch.arange(length, device=mask.device) + mask.argmax(dim=1, keepdim=True)) % length
    return {name: tensor.gather(1, places) for name, tensor in inputs.items()}


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Pool token states.

    Args:
        hidden: ``[n, virtual + length, size]``. Soft prompts put their virtual tokens in front; they are left out.
        attention_mask: ``[n, length]``, 1 for real tokens.
        pooling: ``"mean"`` over real tokens; ``"cls"``, the first real token; or ``"last"``, the last.

    Returns:
        ``[n, size]``.
    """
    hidden = hidden[:, -attention_mask.shape[1] :]
    if pooling != "mean":
        first, last = attention_mask.argmax(dim=1), attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(dim=1)
        place = {"cls": first, "last": last}[pooling]
        return hidden.gather(1, place[:, None, None].expand(-1, 1, hidden.shape[-1])).squeeze(1)
    weights = attention_mask.to(hidden.dtype)
    return (hidden * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1)
