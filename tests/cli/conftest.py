"""A run of a second: a tiny BERT and made-up sentences."""

from __future__ import annotations

import json
import random

import pytest

from tests.tiny import WORDS


@pytest.fixture(autouse=True)
def starts_anew(fresh_accelerator):
    """What ``fresh_accelerator`` does, unasked."""


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    """Twelve classes of ten sentences, told apart by their words."""
    path = tmp_path_factory.mktemp("data") / "sentences.jsonl"
    rng = random.Random(0)
    pairs = [(a, b) for i, a in enumerate(WORDS) for b in WORDS[i + 1 :]][:12]
    lines = []
    for i in range(10):
        for a, b in pairs:
            words = [a, b, *rng.choices(WORDS, k=3), str(i)]
            lines.append(json.dumps({"text": " ".join(words), "label": f"{a} {b}"}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def tiny(tmp_path, bert_folder, data_file):
    """Arguments of a run of a second."""
    settings = {
        "model_name_or_path": bert_folder, "dataset_name": data_file, "duplicates": "keep", "n_way": 2, "n_query": 2,
        "eval_n_query": 2, "lora_r": 2, "num_virtual_tokens": 2, "max_steps": 4, "meta_batch_size": 2,
        "eval_steps": 2, "eval_episodes": 3, "test_episodes": 4, "baseline_episodes": 2, "logging_steps": 1,
        "max_k_shot": "none", "k_shot": 1, "output_dir": tmp_path / "out",
    }  # fmt: skip
    argv = [item for name, value in settings.items() for item in (f"--{name}", str(value))]
    return [*argv, "--eval_k_shots", "1", "3", "--use_cpu"]
