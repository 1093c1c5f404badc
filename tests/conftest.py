"""Fixtures that many tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

# Before any Hugging Face library is imported: no test may reach for a Hub that it did not start itself.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import settings

from tests.languages import tiny_language_model
from tests.tiny import tiny_bert, tiny_network

# The same examples in every run; a busy machine fails no test. `recipes/benchmarks/fuzz.py` looks further.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=30)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny random BERT with its tokenizer."""
    return tiny_bert(Path(tmp_path_factory.mktemp("tiny-bert")))


@pytest.fixture(scope="session")
def folders(
    bert_folder: str, language_folders: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Folders of tiny random backbones by what they take: text, also with a blank or to go on with, vectors, images."""
    networks = {kind: tiny_network(Path(tmp_path_factory.mktemp(kind)), kind) for kind in ("vector", "image")}
    return {"text": bert_folder, "cloze": language_folders("bert"), "phrase": language_folders("gpt2"), **networks}


@pytest.fixture(scope="session")
def language_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folder of a tiny random language model by its family."""
    return cache(lambda family: tiny_language_model(Path(tmp_path_factory.mktemp(family)), family))


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its state in a process-wide singleton: a test that starts without one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny models gain nothing from more threads; a run that sets more must not slow the tests after it."""
    torch.set_num_threads(1)
