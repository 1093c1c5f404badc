"""Tiny random models and tasks, shared by tests of logic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.models.scratch import Conv4Config, Conv4Model, MLPConfig, MLPModel
from fewshot_nlp.types import OUT_OF_SCOPE, Batch, Episode, EpisodeSpec

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["play", "stop", "music", "light", "lamp", "on", "off", "the", "timer", "set", "warm", "cold", "red", "blue"]
HIDDEN = 16


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, over ``WORDS``."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{f"{k}_token": v for k, v in names.items()})


def tiny_bert(folder: Path, seed: int = 0) -> str:
    """Save a random two-layer BERT of 16 units and its tokenizer; returns the folder."""
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def tiny_network(folder: Path, kind: str, norm: str = "group") -> str:
    """Save a small network from scratch, for ``kind`` ``"vector"`` or ``"image"``; returns the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "vector":
            MLPModel(MLPConfig(input_size=3, hidden_size=HIDDEN)).save_pretrained(folder)
        else:
            Conv4Model(Conv4Config(image_size=16, num_filters=6, norm=norm)).save_pretrained(folder)
    return str(folder)


#: Of tiny vision transformers, on grey images of 16×16 in four patches.
PATCHES = {
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 1,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}


def _tiny_vision(folder: Path, model: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    """Save a random vision backbone and an image processor for grey images of 16×16; returns the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = model(config)
        for name, value in built.named_buffers():
            # A pre-trained network's running statistics are not those of the batch at hand.
            if name.endswith("running_mean"):
                torch.nn.init.normal_(value)
            elif name.endswith("running_var"):
                torch.nn.init.uniform_(value, 0.5, 2.0)
        built.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    ViTImageProcessorPil(size=size, image_mean=[0.4], image_std=[0.25]).save_pretrained(folder)
    return str(folder)


def tiny_vit(folder: Path) -> str:
    return _tiny_vision(folder, ViTModel, ViTConfig(**PATCHES, intermediate_size=32))


def tiny_dinov2(folder: Path) -> str:
    return _tiny_vision(folder, Dinov2Model, Dinov2Config(**PATCHES, mlp_ratio=2))


def tiny_clip(folder: Path) -> str:
    """Both towers, as checkpoints have them; the images' is the backbone."""
    texts = {"vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=texts, vision_config={**PATCHES, "intermediate_size": 32}, projection_dim=8)
    return _tiny_vision(folder, CLIPModel, config)


def tiny_resnet(folder: Path) -> str:
    shape = {"embedding_size": 4, "hidden_sizes": [4, HIDDEN], "depths": [1, 1], "layer_type": "basic"}
    return _tiny_vision(folder, ResNetModel, ResNetConfig(num_channels=1, **shape))


def tiny_convnext(folder: Path) -> str:
    shape = {"patch_size": 4, "num_stages": 2, "hidden_sizes": [8, HIDDEN], "depths": [1, 1], "image_size": 16}
    return _tiny_vision(folder, ConvNextModel, ConvNextConfig(num_channels=1, layer_scale_init_value=0.5, **shape))


#: Builders of tiny vision backbones by ``model_type`` of what is loaded; all take ``random_batch(..., kind="image")``.
TINY_VISION = {
    "vit": tiny_vit,
    "dinov2": tiny_dinov2,
    "clip_vision_model": tiny_clip,
    "resnet": tiny_resnet,
    "convnext": tiny_convnext,
}


def random_batch(
    counts: list[int],
    seed: int = 0,
    length: int = 6,
    kind: str = "text",
    dtype: torch.dtype = torch.float64,
    task: str = "classification",
) -> Batch:
    """Random token ids with padding; ``counts[c]`` examples of class ``c``, whose first word tells the class. Or
    random vectors or images, whose mean tells it. Of a regression, its number and some noise are the target."""
    if task == "regression":
        batch = random_batch(counts, seed, length, kind, dtype)
        noise = torch.randn(len(batch), generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64)
        return Batch(batch.inputs, (batch.labels + 0.5 * noise).to(dtype), 1)
    rng = torch.Generator().manual_seed(seed)
    total = sum(counts)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    if kind in ("vector", "image"):
        shape = (3,) if kind == "vector" else (1, 16, 16)
        means = torch.randn(len(counts), *shape, generator=rng, dtype=torch.float64)
        values = means[labels] + torch.randn(total, *shape, generator=rng, dtype=torch.float64)
        name = "values" if kind == "vector" else "pixel_values"
        return Batch({name: values.to(dtype)}, labels, len(counts))
    ids = torch.randint(len(SPECIAL), len(SPECIAL + WORDS), (total, length), generator=rng)
    ids[:, 0] = SPECIAL.index("[CLS]")
    ids[:, 1] = len(SPECIAL) + labels
    if kind == "cloze":
        ids[:, 2] = SPECIAL.index("[MASK]")
    lengths = torch.randint(3, length + 1, (total,), generator=rng)
    lengths[0] = length
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    return Batch({"input_ids": ids * mask, "attention_mask": mask}, labels, len(counts))


def random_episode(
    counts: list[int],
    n_query: int = 2,
    seed: int = 0,
    kind: str = "text",
    dtype: torch.dtype = torch.float64,
    task: str = "classification",
    names: bool = False,
) -> Episode:
    """An episode of random inputs with unequal class counts in its support set, of some without labels, and random
    texts for the names of its classes, if it is to have them."""
    spec = EpisodeSpec("train", seed, "random", tuple(f"class {c}" for c in range(len(counts))), (), ())
    support = random_batch(counts, 2 * seed, kind=kind, dtype=dtype, task=task)
    if names:
        support = replace(support, names=random_batch([1] * len(counts), 2 * seed + 1000).inputs)
    query = random_batch([n_query] * len(counts), 2 * seed + 1, 5, kind, dtype, task)
    other = random_batch([n_query] * len(counts), 1000 + seed, 7, kind, dtype)
    unlabelled = replace(other, labels=torch.full_like(other.labels, OUT_OF_SCOPE))
    return Episode(spec, support, query, unlabelled)


def tiny_config(folder: str, **settings: object) -> FewShotConfig:
    """Settings of a learner on the backbone in ``folder`` that moves visibly in few steps."""
    defaults: dict = {"adapter": "lora", "lora_r": 2, "inner_steps": 2, "inner_learning_rate": 0.5, "head_scale": 4.0}
    processed = any((Path(folder) / name).is_file() for name in ("tokenizer.json", "preprocessor_config.json"))
    if not processed and settings.get("adapter") != "none":
        # A network from scratch is trained as a whole.
        defaults, settings = {**defaults, "adapter": "full"}, {k: v for k, v in settings.items() if k != "adapter"}
    return FewShotConfig(model_name_or_path=folder, **{**defaults, **settings})
