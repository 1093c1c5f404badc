"""Run by ``test_ranks`` on one process or on each of two: train every case for ten steps, the first rank saves.

torchrun --nproc_per_node 2 tests/training/rank_worker.py OUT BERT WORLD_SIZE
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from fewshot_nlp.learners import build_learner
from fewshot_nlp.training import FewShotTrainer
from tests.tiny import random_episode, tiny_config
from tests.training.toy import ToyLearner, ToySampler, toy_args, toy_reader

#: Learner, episodes a micro-round, micro-rounds a step: even, odd, and fewer episodes than ranks.
CASES = {
    "toy-4": ("toy", 4, 1),
    "toy-3": ("toy", 3, 1),
    "toy-1": ("toy", 1, 2),
    "lora-maml-3": ("lora", 3, 1),
    "prompt-maml-1": ("prompt_tuning", 1, 2),
    "memory-3": ("memory", 3, 1),
}


def tiny_reader(spec):
    return random_episode([2, 1, 3], seed=spec.index)


def main(out: Path, bert: str, world_size: int) -> None:
    metrics = {}
    for name, (kind, size, rounds) in CASES.items():
        torch.manual_seed(int(os.environ.get("RANK", 0)))
        method = {"learner": "memory"} if kind == "memory" else {"adapter": kind, "num_virtual_tokens": 3}
        config = None if kind == "toy" else tiny_config(bert, **method)
        args = toy_args(
            out / name, max_steps=10, meta_batch_size=size, gradient_accumulation_steps=rounds, learning_rate=0.01,
            eval_strategy="steps", eval_steps=5, eval_episodes=3, save_strategy="steps", save_steps=5,
            load_best_model_at_end=True,
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
