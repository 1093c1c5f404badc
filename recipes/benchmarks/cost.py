"""What every learner costs: seconds and peak memory of a meta-step and of an adaptation, all on one episode shape.

    python recipes/benchmarks/cost.py
    python recipes/benchmarks/cost.py --learners maml reptile protonet --threads 1

MiniLM with LoRA on the query and value maps of all layers, 4 tasks, 5-way 5-shot with 5 queries a class, sentences of
16 random tokens, the method's settings of recipes/learners/ and as many inner steps as they say. Each learner runs in a
process of its own. Seconds are the fastest of --turns runs, memory is the peak above the loaded model. Prints a table
and writes --json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from fewshot_nlp.cli.parser import read_yaml
from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.functional.memory import forget_peak, peak, resident
from fewshot_nlp.learners import build_learner
from fewshot_nlp.learners.planner import example_episode

SETTINGS = Path(__file__).parents[1] / "learners"
LEARNERS = sorted(path.stem for path in SETTINGS.glob("*.yaml"))
TASKS, N_WAY, K_SHOT, N_QUERY, TOKENS = 4, 5, 5, 5, 16


def config_of(name: str) -> FewShotConfig:
    """The settings of the method, on LoRA in all layers."""
    known = {field.name for field in fields(FewShotConfig)}
    own = {key: value for key, value in read_yaml(SETTINGS / f"{name}.yaml").items() if key in known}
    return FewShotConfig(**{"adapter": "lora", **own})


def seconds(run: Callable[[], object], turns: int) -> float:
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(name: str, turns: int) -> dict[str, float | int | str]:
    config = config_of(name)
    learner = build_learner(config)
    params = learner.init_params()
    episodes = [example_episode(learner, N_WAY, K_SHOT, N_QUERY, [TOKENS], seed) for seed in range(TASKS)]
    # What the first pass brings into memory, weights from their file above all, is the model's.
    learner.model.features(params, episodes[0].query.inputs)
    idle = resident()
    forget_peak()
    found = {"adapt_seconds": seconds(lambda: learner.adapt(params, episodes[0].support), turns)}
    found["adapt_mb"] = (peak() - idle) / 2**20
    found["step_seconds"] = seconds(lambda: learner.meta_grad(params, episodes), turns)
    found["step_mb"] = (peak() - idle) / 2**20
    steps = learner.config.inner_steps if hasattr(learner, "links") else 0
    trained = sum(value.numel() for key, value in params.items() if key not in learner.remembered)
    return {**found, "inner_steps": steps, "adapter": config.adapter, "trained": trained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learners", nargs="+", choices=LEARNERS, default=LEARNERS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("output/cost.json"))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.only:
        print(json.dumps(measure(chosen.only, chosen.turns)))
        return
    rows = {}
    print("| learner | inner steps | adapter | trained parameters | meta-step, s | MB | adaptation, s | MB |")
    print("|---" * 8 + "|")
    for name in chosen.learners:
        own = ["--only", name, "--threads", str(chosen.threads), "--turns", str(chosen.turns)]
        answer = subprocess.run([sys.executable, __file__, *own], capture_output=True, check=True, text=True).stdout
        row = rows[name] = json.loads(answer.splitlines()[-1])
        print(
            f"| {name} | {row['inner_steps'] or ''} | {row['adapter']} | {row['trained']:,} "
            f"| {row['step_seconds']:.2f} | {row['step_mb']:.0f} "
            f"| {row['adapt_seconds']:.2f} | {row['adapt_mb']:.0f} |",
            flush=True,
        )
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
