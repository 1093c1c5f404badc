"""From one vector a token to one vector a text; from one a place to one an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_causal(module: nn.Module) -> bool:
    """Whether a token's state follows from the tokens before it alone, as in a decoder: only the last has read all."""
    # What a configuration turns off, as encoders made of decoders do, layers go on saying.
    told = getattr(getattr(module, "config", None), "is_causal", None)
    if told is False:
        return False
    return any(getattr(part, "is_causal", False) for part in module.modules()) or _seen_to_be_causal(module)


@torch.no_grad()
def _seen_to_be_causal(module: Any) -> bool:
    """Whether another second token leaves the state of the first as it is: not all decoders say what they are."""
    if getattr(module, "main_input_name", None) != "input_ids":
        return False
    ids = torch.tensor([[1, 2], [1, 3]], device=next(module.parameters()).device)
    try:
        # Its states, or of a model with its language head the logits that follow from them.
        first, other = module(input_ids=ids, attention_mask=torch.ones_like(ids))[0][:, -2]
    except Exception:  # what takes more than ids, such as what a decoder is to begin with
        return False
    # Rows of a product may differ by rounding.
    return bool((first - other).abs().max() <= 1e-6 * first.abs().max())


def find_pooling(pooling: str, module: Any, causal: bool) -> str:
    """What ``pooling`` means for a backbone: of texts ``"auto"`` is ``"last"`` of a decoder, ``"mean"`` of others.

    Raises:
        ValueError: it is for images and the backbone takes texts, or the other way.
    """
    images = module.main_input_name == "pixel_values"
    if pooling == ("last" if images else "pooler"):
        raise ValueError(
            f"pooling={pooling!r} is for {'texts' if images else 'images'}, and the backbone takes "
            f"{'images' if images else 'texts'}. Use 'auto', 'mean' or 'cls'."
        )
    # Of images, what the backbone gives decides.
    if pooling != "auto" or module.main_input_name != "input_ids":
        return pooling
    return "last" if causal else "mean"


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


def pool_image(output: Any, pooling: str, special: int) -> Tensor:
    """Features of images.

    Args:
        output: of a vision backbone: ``last_hidden_state`` ``[n, special + patches, size]`` or, of convolutions,
            ``[n, size, height, width]``; of most ``pooler_output``, and of CvT, whose class token stands beside the
            map, ``cls_token_value`` ``[n, 1, size]``.
        pooling: ``"pooler"``, the backbone's own; ``"mean"`` over patches or places; ``"cls"``, the class token; or
            ``"auto"``, the first of pooler, class token and mean that the backbone has.
        special: tokens in front of the patches.

    Returns:
        ``[n, size]``.

    Raises:
        ValueError: a pooling that the backbone has not.
    """
    hidden, own = output.last_hidden_state, getattr(output, "pooler_output", None)
    beside = getattr(output, "cls_token_value", None)
    token = beside if beside is not None else hidden if special and hidden.ndim == 3 else None
    if pooling == "auto":
        pooling = "pooler" if own is not None else "cls" if token is not None else "mean"
    if pooling == "pooler":
        if own is None:
            raise ValueError("pooling='pooler' is not there: the backbone has no pooler. Use 'mean' or 'cls'.")
        return own.flatten(1)
    if pooling == "mean":
        return hidden.mean((2, 3)) if hidden.ndim == 4 else hidden[:, special:].mean(1)
    if token is None:
        raise ValueError(f"pooling={pooling!r} needs a class token, and the backbone has none. Use 'mean' or 'pooler'.")
    return token[:, 0]
