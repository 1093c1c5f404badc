"""DoRA (Liu et al., ICML 2024, arXiv:2402.09353) with the whole of its gradient.

A frozen ``V`` becomes ``m (V + ΔV) / |V + ΔV|``, with LoRA's ``ΔV`` and one magnitude ``m`` and norm for each output.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def exact_forward(
    layer: Any,
    x: Tensor,
    *,
    lora_A: nn.Module,
    lora_B: nn.Module,
    scaling: float,
    base_layer: Any,
    base_result: Tensor,
    adapter_name: str = "default",
) -> Tensor:
    """What DoRA adds to ``base_result``, the layer's own output for ``x``: ``forward`` of PEFT's DoRA layers.

    PEFT's own takes the norm for a constant to save memory, as the paper suggests (section 4.3). What comes out is the
    same; but such a gradient is not the function's, and its derivatives are not those of any function.
    """
    update = layer.get_lora_weight(lora_A, lora_B)
    if base_layer.weight.ndim > 2:
        update = update.reshape(base_layer.weight.shape)
    norm = layer.get_weight_norm(base_layer.weight, update, scaling)
    if base_layer.bias is not None:
        base_result = base_result - base_layer.bias.view(norm.shape)
    scale = layer.weight / norm
    return (scale - 1) * base_result + scale * lora_B(lora_A(x)) * scaling
