"""From one vector a token to one vector a text; from one a place to one an image."""

from __future__ import annotations

from typing import Any

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


def pool_image(output: Any, pooling: str, special: int) -> Tensor:
    """Features of images.

    Args:
        output: of a vision backbone: ``last_hidden_state`` ``[n, special + patches, size]`` or, of convolutions,
            ``[n, size, height, width]``; and, of most, ``pooler_output``.
        pooling: ``"pooler"``, the backbone's own; ``"mean"`` over patches or places; ``"cls"``, the class token; or
            ``"auto"``, the first of pooler, class token and mean that the backbone has.
        special: tokens in front of the patches.

    Returns:
        ``[n, size]``.

    Raises:
        ValueError: a pooling that the backbone has not.
    """
    hidden, own = output.last_hidden_state, getattr(output, "pooler_output", None)
    if pooling == "auto":
        pooling = "pooler" if own is not None else "cls" if special else "mean"
    if pooling == "pooler":
        if own is None:
            raise ValueError("pooling='pooler' is not there: the backbone has no pooler. Use 'mean' or 'cls'.")
        return own.flatten(1)
    if pooling == "mean":
        return hidden.mean((2, 3)) if hidden.ndim == 4 else hidden[:, special:].mean(1)
    if not special:
        raise ValueError(f"pooling={pooling!r} needs a class token, and the backbone has none. Use 'mean' or 'pooler'.")
    return hidden[:, 0]
