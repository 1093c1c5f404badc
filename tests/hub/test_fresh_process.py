"""A saved adapter of each kind answers the same in a process that knows nothing but its folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from fewshot_nlp.hub import FewShotAdapter
from fewshot_nlp.learners import build_learner
from tests.contracts.backbone import SHELF, settings
from tests.tiny import random_batch

TASK = {"task_type": "FEATURE_EXTRACTION"}
#: Given as an object of PEFT's: kinds with and without a name of their own here, and one whose network PEFT loses.
OBJECTS = {
    "prefix with projection": lambda: peft.PrefixTuningConfig(**TASK, num_virtual_tokens=2, prefix_projection=True),
    "lora and all biases": lambda: peft.LoraConfig(**TASK, r=2, target_modules=["query"], bias="all"),
    "vera": lambda: peft.VeraConfig(**TASK, r=4),
    "oft": lambda: peft.OFTConfig(**TASK, oft_block_size=4),
    "loha": lambda: peft.LoHaConfig(**TASK, r=2),
}


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_every_kind_answers_the_same(bert_folder, tmp_path):
    support, expected = random_batch([2, 3], seed=4), {}
    for name in (*SHELF, *OBJECTS):
        learner_name = "protonet" if name == "none" else "maml"
        config = settings(bert_folder, name if name in SHELF else "lora", learner_name)
        learner = build_learner(config, peft_config=OBJECTS[name]() if name in OBJECTS else None)
        rng = torch.Generator().manual_seed(1)
        params = {n: v + 0.1 * torch.randn(v.shape, generator=rng) for n, v in learner.init_params().items()}
        FewShotAdapter(learner, params).save_pretrained(tmp_path / "saved" / name)
        state = learner.adapt(params, support)
        expected[f"{name} logits"] = learner.predict(params, state, support).detach()
        expected[f"{name} features"] = learner.model.features(params, support.inputs).detach()
    save_file({**support.inputs, "labels": support.labels}, tmp_path / "inputs.safetensors")
    script = Path(__file__).with_name("fresh_process.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = [bert_folder, tmp_path / "inputs.safetensors", tmp_path / "answers.safetensors", tmp_path / "saved"]
    subprocess.run([sys.executable, script, *map(str, arguments)], env=environment, check=True, capture_output=True)
    found = load_file(tmp_path / "answers.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # By this package to the bit; plain PEFT has another attention.
        tolerance = {"rtol": 0, "atol": 0} if name.endswith("logits") else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
