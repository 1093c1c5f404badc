"""What adapters other than LoRA train in a backbone, where PEFT's own tables say nothing."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.functional.trunk import find_layers

#: What IA3 scales by its outputs, keys and values, and by its inputs, the second map of each feed-forward block (Liu et
#: al. 2022), by model type; of a fused projection the queries, too.
IA3_TARGETS: dict[str, tuple[list[str], list[str]]] = {
    "albert": (["key", "value"], ["ffn_output"]),
    "clip_vision_model": (["k_proj", "v_proj"], ["fc2"]),
    "convnext": ([], ["pwconv2"]),
    "dinov2": (["k_proj", "v_proj"], ["fc2"]),
    "distilbert": (["k_lin", "v_lin"], ["lin2"]),
    "electra": (["key", "value"], ["output.dense"]),
    "modernbert": (["Wqkv"], ["mlp.Wo"]),
    "mpnet": (["k", "v"], ["output.dense"]),
    "resnet": (["convolution"], []),
    "umt5": (["k", "v"], ["wo"]),
    "vit": (["k_proj", "v_proj"], ["fc2"]),
}

MAPS = (nn.Linear, nn.Conv2d, Conv1D)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


def norms(module: nn.Module) -> list[str]:
    """Full names of the normalisation layers that have a scale.

    Raises:
        ValueError: there are none.
    """
    found = [
        name
        for name, part in module.named_modules()
        # Llama and T5, and the kin of both, bring a class each.
        if (isinstance(part, _NORMS) or type(part).__name__.endswith(("RMSNorm", "LayerNorm")))
        and getattr(part, "weight", None) is not None
    ]
    if not found:
        raise ValueError(
            f"adapter='layernorm' trains the scales of normalisation layers, and {type(module).__name__} has none. "
            f"Use adapter='lora' or 'full'."
        )
    return found


def first_map(module: nn.Module) -> str:
    """Full name of the first linear or convolutional layer.

    Raises:
        ValueError: the backbone has no biases, or no such layer.
    """
    names = [name for name, part in module.named_modules() if isinstance(part, MAPS)]
    if not names or not any(name.endswith(".bias") for name, _ in module.named_parameters()):
        raise ValueError(
            f"adapter='bitfit' trains biases, and {type(module).__name__} has none. Use adapter='layernorm', 'ia3' or "
            f"'lora'."
        )
    return names[0]


def in_layers(module: Any, targets: list[str], layers: list[int]) -> list[str] | None:
    """Full names of ``targets`` in some layers, where PEFT's own ``layers_to_transform`` does not find these.

    It looks for a number between dots with a name and a dot before it, as in ``encoder.layer.0.``, which bare decoders,
    whose layers are ``h.0.`` or ``layers.0.``, have not; of two, as in T5's ``encoder.block.1.layer.0.``, old versions
    take the second. ``None`` where it does find them.

    Raises:
        ValueError: there is no such layer.
    """
    stack = find_layers(module)
    place = next((name for name, part in module.named_modules() if part is stack), ".")
    if stack is None or any(part.isdigit() for part in place.split(".")):
        return None
    if "." in place and not any(isinstance(part, nn.ModuleList) for layer in stack for part in layer.modules()):
        return None
    wrong = [i for i in layers if not 0 <= i < len(stack)]
    if wrong:
        raise ValueError(
            f"lora_layers_to_transform={layers} names {wrong[0]}, and the backbone {module.name_or_path!r} has "
            f"{len(stack)} layers, counted from 0. Name some of them, or leave it out."
        )
    names = [f"{place}.{i}.{name}" for i in layers for name, _ in stack[i].named_modules()]
    return [name for name in names if any(name.endswith(f".{target}") for target in targets)]


def is_transposed(module: nn.Module) -> bool:
    """Whether weights are ``[in, out]``, as in GPT-2, and not ``[out, in]``."""
    return any(isinstance(part, Conv1D) for part in module.modules())


def unfreeze(module: Any, config: FewShotConfig) -> nn.Module:
    """Train all of ``module``, or ``config.layers_to_train``; ``ValueError`` where it has not got these."""
    if config.layers_to_train is None:
        return module.requires_grad_(True)
    layers = find_layers(module) or ()
    wrong = [i for i in config.layers_to_train if not 0 <= i < len(layers)]
    if wrong:
        raise ValueError(
            f"layers_to_train={config.layers_to_train} names {wrong[0]}, and the backbone {module.name_or_path!r} has "
            f"{len(layers)} layers, counted from 0. Name some of them, or leave it out to train all."
        )
    module.requires_grad_(False)
    for i in config.layers_to_train:
        layers[i].requires_grad_(True)
    return module
