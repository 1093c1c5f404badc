"""The table of backbones and adapters, by the very checks of the contract.

    python -m tests.contracts.shelf
    python -m tests.contracts.shelf bert llama

A number says how many parameters the adapter trains in a model of MiniLM's shape (6 layers of 384 units, 12 heads; of
ResNet and ConvNeXt in ResNet-50 and ConvNeXt-T), with the settings' defaults (8 virtual tokens, rank 8): in a tiny
model of the family, meta-gradients of MAML, Reptile and prototypes are then exact, and what is saved is read by plain
PEFT (full models: transformers). "no": the pair is refused when it is built.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    ConvNextConfig,
    Dinov2Config,
    PreTrainedConfig,
    ResNetConfig,
    ViTConfig,
)
from transformers.utils import logging

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.models.adapters import build_adapter
from fewshot_nlp.models.backbone import reader
from tests.contracts import backbone as contract
from tests.contracts.backbone import LEARNERS, REFUSED, SHELF, Cell, takes
from tests.contracts.families import FAMILIES, text_configs

PATCHES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "vit": lambda: ViTConfig(**PATCHES, intermediate_size=1536),
    "dinov2": lambda: Dinov2Config(**PATCHES),
    "clip_vision_model": lambda: CLIPVisionConfig(**PATCHES, intermediate_size=1536),
    "resnet": ResNetConfig,
    "convnext": ConvNextConfig,
}


def real(family: str) -> Any:
    """A model of real size, with random weights."""
    config = SHAPES[family]() if family in SHAPES else text_configs(384, 6, 12)[family]
    return reader(config).from_config(config)


def trained(family: str, adapter: str, module: Any) -> int:
    """How many parameters ``adapter`` trains in ``module``; of ``full``, without the words' embeddings."""
    adapted = build_adapter(copy.deepcopy(module), FewShotConfig(**SHELF[adapter]))
    embeddings = adapted.get_input_embeddings().weight if FAMILIES[family].kind == "text" else None
    return sum(v.numel() for v in adapted.parameters() if v.requires_grad and v is not embeddings)


def flaws(cell: Cell) -> list[str]:
    """What does not hold, in words."""
    found = []
    for name in (learner for learner in LEARNERS if takes(cell.adapter, learner)):
        try:
            contract.meta_gradient_is_exact(cell, name)
        except AssertionError:
            found.append(f"{name} inexact")
    try:
        contract.plain_libraries_read_it(cell)
    except AssertionError:
        found.append("not read by plain libraries")
    return found


def row(family: str, folder: str) -> list[str]:
    """One cell of the table for each adapter."""
    cells, module = [], real(family)
    for adapter in SHELF:
        if (family, adapter) in REFUSED:
            cells.append("no")
            continue
        wrong = flaws(Cell(FAMILIES[family], adapter, folder))
        cells.append(", ".join(wrong) or f"{trained(family, adapter, module):,}")
    return cells


def main(families: list[str]) -> None:
    print("| | " + " | ".join(f"`{name}`" for name in SHELF) + " |\n" + "|---" * (len(SHELF) + 1) + "|")
    with tempfile.TemporaryDirectory() as parent:
        for family in families or FAMILIES:
            cells = row(family, FAMILIES[family].save(Path(parent) / family))
            print(f"| {family} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    main(sys.argv[1:])
