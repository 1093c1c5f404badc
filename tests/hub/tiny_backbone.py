"""A BERT of a few thousand random weights with a WordPiece tokenizer, saved as AutoModel expects it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = [
    "turn",
    "on",
    "off",
    "the",
    "light",
    "play",
    "music",
    "stop",
    "what",
    "is",
    "weather",
    "set",
    "a",
    "timer",
    "kitchen",
    "bedroom",
    "please",
]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tiny_bert(folder: Path, hidden_size: int = 16, seed: int = 0) -> Path:
    """Save the backbone to ``folder`` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *LETTERS[1:], *(f"##{c}" for c in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder
