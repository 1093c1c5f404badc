"""Fixtures that many tests share."""

from __future__ import annotations

import os
from pathlib import Path

# Before any Hugging Face library is imported: no test may reach for a Hub that it did not start itself.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import pytest

from tests.tiny import tiny_bert


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny random BERT with its tokenizer."""
    return tiny_bert(Path(tmp_path_factory.mktemp("tiny-bert")))
