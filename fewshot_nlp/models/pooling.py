"""From one vector a token to one vector a text."""

from __future__ import annotations

from torch import Tensor


def pool(hidden: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Pool token states.

    Args:
        hidden: ``[n, virtual + length, size]``. Soft prompts put their virtual tokens in front; they are left out.
        attention_mask: ``[n, length]``, 1 for real tokens.
        pooling: ``"mean"`` over real tokens, or ``"cls"``, the first real token.

    Returns:
        ``[n, size]``.
    """
    hidden = hidden[:, -attention_mask.shape[1] :]
    if pooling == "cls":
        first = attention_mask.argmax(dim=1)
        return hidden.gather(1, first[:, None, None].expand(-1, 1, hidden.shape[-1])).squeeze(1)
    weights = attention_mask.to(hidden.dtype)
    return (hidden * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1)
