"""What the planner predicts for six unlike settings, and what is then measured.

    python recipes/benchmarks/planning.py

Each setting runs in a process of its own, on the default backbone: the plan is made, then the training step is taken
on other episodes than the plan's. Prints a table and writes JSON: peak memory above the loaded model, and
seconds a step, the fastest of four since noise only adds, predicted and measured, with their ratio.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.functional.memory import forget_peak, peak, resident
from fewshot_nlp.learners import BaseLearner, build_learner
from fewshot_nlp.learners.planner import example_episode, plan
from fewshot_nlp.types import Episode

#: Settings of the learner, and shape of a training step.
SETTINGS: dict[str, tuple[dict, dict]] = {
    "soft prompt, MAML, 1 step": (
        {"learner": "maml", "adapter": "prompt_tuning", "inner_steps": 1},
        {"n_way": 5, "k_shot": 3, "n_query": 5, "tokens": 10, "meta_batch_size": 4},
    ),
    "LoRA, MAML, 5 steps in one graph": (
        {"learner": "maml", "adapter": "lora", "inner_steps": 5},
        {"n_way": 5, "k_shot": 5, "n_query": 5, "tokens": 16, "meta_batch_size": 2},
    ),
    "LoRA, MAML, 20 steps one by one": (
        {"learner": "maml", "adapter": "lora", "inner_steps": 20, "graph_memory_gb": 0.01},
        {"n_way": 5, "k_shot": 2, "n_query": 5, "tokens": [8, 12, 30], "meta_batch_size": 2},
    ),
    "all weights, ANIL, 20 steps": (
        {"learner": "anil", "adapter": "full", "inner_steps": 20},
        {"n_way": 25, "k_shot": 1, "n_query": 4, "tokens": 14, "meta_batch_size": 1},
    ),
    "all weights, first-order MAML, 10 steps": (
        {"learner": "fomaml", "adapter": "full", "inner_steps": 10, "inner_rule": "momentum"},
        {"n_way": 5, "k_shot": 1, "n_query": 5, "tokens": 20, "meta_batch_size": 2},
    ),
    "LoRA, prototypes": (
        {"learner": "protonet", "adapter": "lora", "head": "prototype"},
        {"n_way": 20, "k_shot": 5, "n_query": 5, "tokens": 24, "meta_batch_size": 2},
    ),
}


def prepared(name: str) -> tuple[BaseLearner, list[Episode]]:
    """The learner of a setting, and episodes of its shape."""
    settings, shape = SETTINGS[name]
    learner = build_learner(FewShotConfig(**settings))
    lengths = shape["tokens"] if isinstance(shape["tokens"], list) else [shape["tokens"]]
    seeds = range(1, 1 + shape["meta_batch_size"])
    return learner, [
        example_episode(learner, shape["n_way"], shape["k_shot"], shape["n_query"], lengths, seed) for seed in seeds
    ]


def measure(name: str) -> dict[str, float]:
    """Predicted and measured figures of one setting, in this process."""
    settings, shape = SETTINGS[name]
    predicted = plan(FewShotConfig(**settings), **shape)
    learner, episodes = prepared(name)
    params = learner.init_params()
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        learner.meta_grad(params, episodes)
        seconds.append(time.perf_counter() - start)
    return {
        "predicted_seconds": predicted.chosen.seconds,
        "seconds": min(seconds),
        "predicted_gb": predicted.chosen.memory_gb,
    }


def measure_memory(name: str) -> float:
    """Peak memory of two steps above the loaded model in this process, which has done nothing else, in GiB.

    The second has the optimiser's moments in memory.
    """
    learner, episodes = prepared(name)
    # The first pass reads the weights from their file.
    learner.model.features(learner.init_params(), example_episode(learner, 2, 1, 1).support.inputs)
    forget_peak()
    idle = resident()
    params = {key: torch.nn.Parameter(value) for key, value in learner.init_params().items()}
    optimiser = torch.optim.AdamW(params.values())
    for _ in range(2):
        grads = learner.meta_grad({key: value.detach() for key, value in params.items()}, episodes).grads
        for key, value in params.items():
            value.grad = grads[key]
        optimiser.step()
    return (peak() - idle) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--json", type=Path, default=Path("output/planning.json"))
    parser.add_argument("--only", nargs=2, metavar=("WHAT", "SETTING"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.only:
        what, name = chosen.only
        print(json.dumps(measure(name) if what == "seconds" else {"gb": measure_memory(name)}))
        return
    rows = {}
    print("| setting | GB predicted | measured | ratio | seconds predicted | measured | ratio |\n" + "|---" * 7 + "|")
    for name in chosen.settings:
        row = rows[name] = {}
        for what in ("seconds", "memory"):
            command = [sys.executable, __file__, "--threads", str(chosen.threads), "--only", what, name]
            answer = subprocess.run(command, capture_output=True, check=True, text=True).stdout
            row |= json.loads(answer.splitlines()[-1])
        print(
            f"| {name} | {row['predicted_gb']:.2f} | {row['gb']:.2f} | {row['predicted_gb'] / row['gb']:.2f} "
            f"| {row['predicted_seconds']:.2f} | {row['seconds']:.2f} "
            f"| {row['predicted_seconds'] / row['seconds']:.2f} |",
            flush=True,
        )
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
