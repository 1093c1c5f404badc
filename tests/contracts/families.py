"""A tiny random model of each family of backbones. A family joins by one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertConfig,
    AutoModel,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    Qwen2Config,
    RobertaConfig,
    T5Config,
    UMT5Config,
)

from tests.tiny import HIDDEN, SPECIAL, TINY_VISION, WORDS, tiny_tokenizer

#: As microsoft/deberta-v3-base has it, but for its few buckets of distances.
DEBERTA: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
}


def text_configs(hidden: int = HIDDEN, layers: int = 2, heads: int = 2) -> dict[str, PreTrainedConfig]:
    """Configurations of one shape, by ``model_type``."""
    words, feed_forward, positions = len(SPECIAL + WORDS), (2 if hidden == HIDDEN else 4) * hidden, 128
    sizes: dict[str, Any] = {
        "vocab_size": words,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": feed_forward,
        "max_position_embeddings": positions,
    }
    # RoBERTa and its kin number positions from behind the padding index.
    more = {**sizes, "max_position_embeddings": positions + 2}
    groups = {**sizes, "num_key_value_heads": max(1, heads // 4), "pad_token_id": 0}
    # T5 divides no scores by their size: with more of it attention is so steep that finite differences are coarse.
    halves: dict[str, Any] = {
        "vocab_size": words,
        "d_model": hidden,
        "d_kv": hidden // heads,
        "d_ff": feed_forward,
        "num_layers": layers,
        "num_heads": heads,
        "initializer_factor": 0.5,
    }
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    configs: list[PreTrainedConfig] = [
        BertConfig(**sizes),
        RobertaConfig(**more, pad_token_id=0, type_vocab_size=1),
        DistilBertConfig(
            vocab_size=words,
            dim=hidden,
            n_layers=layers,
            n_heads=heads,
            hidden_dim=feed_forward,
            max_position_embeddings=positions,
        ),
        DebertaV2Config(**sizes, **DEBERTA, pooler_hidden_size=hidden),
        ElectraConfig(**sizes, embedding_size=hidden // 2),
        MPNetConfig(**more),
        ModernBertConfig(**sizes, **ends, local_attention=4),
        AlbertConfig(**sizes, embedding_size=hidden // 2),
        GPT2Config(vocab_size=words, n_embd=hidden, n_layer=layers, n_head=heads, n_positions=positions),
        LlamaConfig(**groups),
        Qwen2Config(**groups),
        T5Config(**halves),
        UMT5Config(**halves),
    ]
    return {config.model_type: config for config in configs}


def save_text(config: PreTrainedConfig, folder: Path, seed: int = 0) -> str:
    """Save a random model of ``config``, whose biases and norms are none of zero or one, and its tokenizer."""
    config.initializer_range = 0.3
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModel.from_config(config).save_pretrained(folder)
        unlike_a_start(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def unlike_a_start(folder: Path) -> None:
    """Move what pre-training would have moved: vectors that start at zeros or ones."""
    path = folder / "model.safetensors"
    moved = {name: v + 0.2 * torch.randn(v.shape) if v.ndim == 1 else v for name, v in load_file(path).items()}
    save_file(moved, path, metadata={"format": "pt"})


@dataclass(frozen=True)
class Family:
    """Backbones of one ``model_type``.

    Attributes:
        name: the ``model_type``.
        kind: what they take, ``"text"`` or ``"image"``.
        save: writes a tiny random one to a folder, and returns that.
    """

    name: str
    kind: str
    save: Callable[[Path], str]


def _text(name: str) -> Family:
    return Family(name, "text", lambda folder: save_text(text_configs()[name], folder))


FAMILIES = {
    **{name: _text(name) for name in text_configs()},
    **{name: Family(name, "image", build) for name, build in TINY_VISION.items()},
}
