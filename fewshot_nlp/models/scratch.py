"""The networks that few-shot papers train from scratch, as transformers models: the four-block convolutional network
("conv-4", Vinyals et al. 2016; Snell et al. 2017), the residual network of twelve layers (Oreshkin et al. 2018, TADAM)
and the perceptron of the sinusoids (Finn et al. 2017).

Their names stand where a Hub id or folder would, ``model_name_or_path="conv4"``; for another shape, save one to a
folder and give that.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from fewshot_nlp.checks import at_least, choice

NORMS = ("batch", "group")


class MLPConfig(PreTrainedConfig):
    """``num_layers`` layers of ``hidden_size`` units on vectors of ``input_size`` numbers."""

    model_type = "fewshot_mlp"

    def __init__(self, input_size: int = 1, hidden_size: int = 40, num_layers: int = 2, **kwargs: Any) -> None:
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            at_least(name, value, 1)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        super().__init__(**kwargs)


class Conv4Config(PreTrainedConfig):
    """Four blocks of ``num_filters`` 3×3 filters, normalisation, ReLU and 2×2 max-pooling; features are all places.

    ``norm="batch"`` normalises with the statistics of the batch at hand, queries among them, as MAML's published
    figures do: the model is transductive. ``"group"`` normalises each image alone.
    """

    model_type = "fewshot_conv4"

    def __init__(
        self,
        num_channels: int = 1,
        image_size: int = 28,
        num_filters: int = 64,
        norm: str = "batch",
        **kwargs: Any,
    ) -> None:
        at_least("num_channels", num_channels, 1)
        at_least("image_size", image_size, 16)
        at_least("num_filters", num_filters, 1)
        choice("norm", norm, NORMS)
        self.num_channels, self.image_size, self.num_filters, self.norm = num_channels, image_size, num_filters, norm
        self.hidden_size = num_filters * (image_size // 16) ** 2
        super().__init__(**kwargs)


class ResNet12Config(PreTrainedConfig):
    """Four residual blocks of three 3×3 convolutions each, 2×2 max-pooling after each block, leaky ReLUs of slope 0.1,
    ``hidden_sizes`` filters: the network of Lee et al., MetaOptNet, CVPR 2019 (arXiv:1904.03758), without DropBlock.

    Features are all places of the last block, as there; ``pooling="mean"`` is their mean, as in TADAM. ``norm`` as of
    ``Conv4Config``.
    """

    model_type = "fewshot_resnet12"

    def __init__(
        self,
        num_channels: int = 3,
        image_size: int = 84,
        hidden_sizes: Sequence[int] = (64, 160, 320, 640),
        norm: str = "batch",
        **kwargs: Any,
    ) -> None:
        at_least("num_channels", num_channels, 1)
        at_least("image_size", image_size, 16)
        if len(hidden_sizes) != 4:
            raise ValueError(f"hidden_sizes={hidden_sizes!r} must be four numbers of filters, one a block.")
        for size in hidden_sizes:
            at_least("hidden_sizes", size, 1)
        choice("norm", norm, NORMS)
        self.num_channels, self.image_size, self.norm = num_channels, image_size, norm
        self.hidden_sizes = list(hidden_sizes)
        super().__init__(**kwargs)


class _Scratch(PreTrainedModel):
    def _init_weights(self, module: nn.Module) -> None:
        """As the papers do: truncated normals and zeros (Finn et al. 2017)."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class MLPModel(_Scratch):
    """Features ``[n, hidden_size]`` of ``values`` ``[n, input_size]``."""

    config_class = MLPConfig
    main_input_name = "values"

    def __init__(self, config: MLPConfig) -> None:
        super().__init__(config)
        sizes = [config.input_size] + [config.hidden_size] * config.num_layers
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.post_init()

    def forward(self, values: Tensor) -> BaseModelOutputWithPooling:
        for layer in self.layers:
            values = torch.relu(layer(values))
        return BaseModelOutputWithPooling(last_hidden_state=values, pooler_output=values)


class Conv4Model(_Scratch):
    """Features ``[n, hidden_size]`` of ``pixel_values`` ``[n, num_channels, image_size, image_size]``."""

    config_class = Conv4Config
    main_input_name = "pixel_values"

    def __init__(self, config: Conv4Config) -> None:
        super().__init__(config)
        channels = [config.num_channels] + [config.num_filters] * 4
        self.blocks = nn.ModuleList(
            # The larger of two, then its positive part, is the larger of two positive parts, at a quarter of the work.
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), _norm(config.norm, b), nn.MaxPool2d(2), nn.ReLU())
            for a, b in pairwise(channels)
        )
        self.post_init()

    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        for block in self.blocks:
            pixel_values = block(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values, pooler_output=pixel_values.flatten(1))


class _ResidualBlock(nn.Module):
    """``[n, inputs, height, width]`` to ``[n, filters, height // 2, width // 2]``."""

    def __init__(self, inputs: int, filters: int, norm: str) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for channels in (inputs, filters, filters):
            parts += [nn.Conv2d(channels, filters, 3, padding=1, bias=False), _norm(norm, filters), nn.LeakyReLU(0.1)]
        self.layers = nn.Sequential(*parts[:-1])
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, filters, 1, bias=False), _norm(norm, filters))
        # As in conv-4, the order of the last two saves arithmetic and changes nothing.
        self.top = nn.Sequential(nn.MaxPool2d(2), nn.LeakyReLU(0.1))

    def forward(self, features: Tensor) -> Tensor:
        return self.top(self.layers(features) + self.shortcut(features))


class ResNet12Model(_Scratch):
    """Features ``[n, places of the last block]`` of ``pixel_values`` ``[n, num_channels, image_size, image_size]``."""

    config_class = ResNet12Config
    main_input_name = "pixel_values"

    def __init__(self, config: ResNet12Config) -> None:
        super().__init__(config)
        sizes = [config.num_channels, *config.hidden_sizes]
        self.blocks = nn.ModuleList(_ResidualBlock(a, b, config.norm) for a, b in pairwise(sizes))
        self.post_init()

    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        for block in self.blocks:
            pixel_values = block(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values, pooler_output=pixel_values.flatten(1))


def _norm(norm: str, channels: int) -> nn.Module:
    # Without running statistics, which are no parameters and would belong to no task.
    return nn.BatchNorm2d(channels, track_running_stats=False) if norm == "batch" else nn.GroupNorm(1, channels)


#: Configuration and model of each network, by the name to give as ``model_name_or_path``.
SCRATCH: dict[str, tuple[type[PreTrainedConfig], type[_Scratch]]] = {
    "mlp": (MLPConfig, MLPModel),
    "conv4": (Conv4Config, Conv4Model),
    "resnet12": (ResNet12Config, ResNet12Model),
}

for _config, _model in SCRATCH.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
