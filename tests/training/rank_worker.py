"""Run by ``test_ranks`` on one process or on each of two: train every case, the first rank saves.

torchrun --nproc_per_node 2 tests/training/rank_worker.py OUT BERT WORLD_SIZE
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from fewshot_nlp.config import LEARNERS
from fewshot_nlp.learners import build_learner
from fewshot_nlp.training import FewShotTrainer
from tests.tiny import random_episode, tiny_config
from tests.training.toy import ToyLearner, ToySampler, toy_args, toy_reader


class Case(NamedTuple):
    """What is trained: ``size`` episodes in each of ``rounds`` micro-rounds a step; the toy learner if not named."""

    size: int
    rounds: int = 1
    adapter: str = "lora"
    learner: str | None = None
    steps: int = 10
    optim: str = "adamw_torch"


#: Even, odd, and fewer episodes than ranks; then every learner, whose rounding errors Adam would blow up where a
#: gradient is next to nothing.
CASES = {
    "toy-4": Case(4),
    "toy-3": Case(3),
    "toy-1": Case(1, rounds=2),
    "lora-maml-3": Case(3, learner="maml"),
    "prompt-maml-1": Case(1, rounds=2, adapter="prompt_tuning", learner="maml"),
    **{f"every learner: {name}": Case(3, learner=name, steps=2, optim="sgd") for name in LEARNERS},
}


def tiny_reader(spec):
    # A memory hides from a task what it knows of its own classes, so that each task has others.
    classes = tuple(f"class {spec.index} {c}" for c in range(spec.n_way))
    return replace(random_episode([2, 1, 3], seed=spec.index), spec=replace(spec, classes=classes))


def main(out: Path, bert: str, world_size: int) -> None:
    metrics = {}
    for name, case in CASES.items():
        torch.manual_seed(int(os.environ.get("RANK", 0)))
        config = None
        if case.learner is not None:
            settings = {"adapter": case.adapter, "learner": case.learner, "inner_learning_rate": 0.1}
            config = tiny_config(bert, num_virtual_tokens=3, **settings)
        args = toy_args(
            out / name, max_steps=case.steps, meta_batch_size=case.size, gradient_accumulation_steps=case.rounds,
            learning_rate=0.01, optim=case.optim, eval_strategy="steps", eval_steps=case.steps // 2, eval_episodes=3,
            save_strategy="steps", save_steps=case.steps // 2, load_best_model_at_end=True,
        )  # fmt: skip
        # A start of random numbers, unlike on each rank: the first one's counts.
        learner = ToyLearner() if config is None else build_learner(config, seed=int(os.environ.get("RANK", 0)))
        reader = toy_reader if config is None else tiny_reader
        trainer = FewShotTrainer(learner, args, ToySampler(), reader, {"1-shot": ToySampler("validation")})
        accelerator = trainer.accelerator
        assert accelerator.num_processes == world_size, f"{accelerator.num_processes} processes, not {world_size}"
        assert accelerator.state.use_distributed == (world_size > 1)
        start = {f"start.{key}": value.detach().clone() for key, value in trainer.params.items()}
        trainer.train()
        if accelerator.is_main_process:
            save_file({**start, **trainer.detached_params()}, out / f"{name}.safetensors")
            evals = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
            metrics[name] = [{k: v for k, v in entry.items() if k != "episodes_per_second"} for entry in evals]
            (out / "metrics.json").write_text(json.dumps(metrics))
        accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
