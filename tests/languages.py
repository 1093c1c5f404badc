"""Tiny random language models of every family, with the head that they are pre-trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, BertModel

from tests.tiny import HIDDEN, SPECIAL, WORDS, tiny_tokenizer

#: Sizes under the names that most families have for them.
SIZES: dict[str, Any] = {
    "vocab_size": len(SPECIAL + WORDS),
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 3,
}
#: What a family needs beside these. Those of the second table are decoders.
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"type_vocab_size": 1},
    "distilbert": {"dim": HIDDEN, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "albert": {"embedding_size": 8},
    "electra": {"embedding_size": 8},
    "mpnet": {"pad_token_id": 1},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    "modernbert": {"cls_token_id": 2, "sep_token_id": 3},
}
DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_inner": 32, "n_positions": 128},
    # Of shared keys and values, as in SmolLM.
    "llama": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 12},
}
FAMILIES = {**ENCODERS, **DECODERS}


def tiny_language_model(folder: Path, family: str) -> str:
    """Save a random two-layer model of 16 units with its head and tokenizer; returns the folder.

    The tokenizer of a decoder has neither a padding token nor a blank, as usual.
    """
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    kind = AutoModelForCausalLM if family in DECODERS else AutoModelForMaskedLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind.from_config(config)
        for name, value in model.named_parameters():
            if "bias" in name:
                torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    if family in DECODERS:
        tokenizer.pad_token = tokenizer.mask_token = tokenizer.cls_token = None
        tokenizer.eos_token = "[SEP]"
        tokenizer._tokenizer.post_processor = None
    tokenizer.save_pretrained(folder)
    return str(folder)


def bare_bert(folder: Path) -> str:
    """The same BERT without its head."""
    config = AutoConfig.for_model("bert", **SIZES)
    BertModel(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)
