"""Sinusoids (Finn et al. 2017): how well methods fit a new sine wave from ten points, after one and ten inner steps.

    python recipes/benchmarks/sinusoid.py
    python recipes/benchmarks/sinusoid.py --methods maml meta_sgd --max_steps 10000 --output_dir output/sinusoid_long

The task of MAML's section 5.1: amplitude from [0.1, 5], phase from [0, π], x from [-5, 5], a network of two layers of
40 units and a squared loss. Every method trains on the same tasks, `--meta_batch_size` a step, for `--max_steps` steps.
The step size of the inner loop at test is the best of `RATES` on validation tasks, for each method and number of steps;
Meta-SGD has learned its own for one step, and what they are multiplied by is the best of `FACTORS`. Prints a table of
the mean squared error over 600 test tasks with its 95 % interval, and leaves `<method>.json` in `output_dir`; a method
whose file is there, with the same settings, is not trained again.

Published, from Li et al. 2017 (arXiv:1707.09835, table 1), 10-shot, one step, 60,000 iterations: MAML 0.85 ± 0.14,
Meta-SGD 0.53 ± 0.09.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.data import SinusoidSampler, read_sinusoid
from fewshot_nlp.evaluation import EvaluationResult, evaluate
from fewshot_nlp.evaluation.intervals import mean_interval
from fewshot_nlp.learners import BaseLearner, build_learner
from fewshot_nlp.training import FewShotTrainer, FewShotTrainingArguments
from fewshot_nlp.types import Params

#: Settings of FewShotConfig, and of training, by method.
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # Without inner steps the meta-gradient is that of one network for all tasks.
    "pretraining": ("pre-training on all tasks, then fine-tuning", {"learner": "maml", "inner_steps": 0}, {}),
    "reptile": (
        "Reptile",
        {"learner": "reptile", "inner_steps": 5, "inner_learning_rate": 0.02},
        {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "linear"},
    ),
    "fomaml": ("first-order MAML", {"learner": "fomaml"}, {}),
    "maml": ("MAML", {"learner": "maml"}, {}),
    "meta_sgd": ("Meta-SGD", {"learner": "meta_sgd"}, {}),
}
SETTINGS = {"model_name_or_path": "mlp", "adapter": "full", "task": "regression", "inner_learning_rate": 0.01}
TRAINING = {
    "learning_rate": 0.002, "lr_scheduler_type": "cosine", "max_grad_norm": 10.0, "eval_strategy": "no",
    "save_strategy": "no", "logging_steps": 500, "disable_tqdm": True, "overwrite_output_dir": True, "use_cpu": True,
}  # fmt: skip
STEPS = (1, 10)
RATES = (0.003, 0.01, 0.02, 0.05)
FACTORS = (0.1, 0.3, 1.0)
PUBLISHED = {"maml": "0.85 ± 0.14", "meta_sgd": "0.53 ± 0.09"}
#: Of validation and test tasks; training counts from --seed.
EVAL_SEED, QUERIES = 0, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--max_steps", type=int, default=10000)
    parser.add_argument("--meta_batch_size", type=int, default=8)
    parser.add_argument("--k_shot", type=int, default=10)
    parser.add_argument("--validation_episodes", type=int, default=200)
    parser.add_argument("--test_episodes", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("output/sinusoid_benchmark"))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    found = {method: measured(method, args) for method in args.methods}
    print(f"\nMean squared error, {args.k_shot}-shot, {args.test_episodes} test tasks ± 95 % interval\n")
    print("| method | 1 step | 10 steps | step sizes | seconds of training | published, 1 step |")
    print("|---|---:|---:|---|---:|---:|")
    for method, result in found.items():
        cells = [cell(entry) for entry in result["test"].values()]
        times = "learned times " if method == "meta_sgd" else ""
        rates = ", ".join(f"{times}{entry['rate']}" for entry in result["test"].values())
        row = [METHODS[method][0], *cells, rates, f"{result['seconds']:.0f}", PUBLISHED.get(method, "")]
        print(f"| {' | '.join(row)} |")


def cell(entry: dict[str, Any]) -> str:
    if entry["diverged"]:
        return f"diverged on {entry['diverged']} tasks"
    return f"{entry['mse']:.3f} ± {entry['ci95']:.3f}"


def measured(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """The result of a method, from its file where there is one of the same settings."""
    _, settings, training = METHODS[method]
    config = FewShotConfig(**{**SETTINGS, **settings})
    protocol = {
        "config": config.to_dict(),
        "training": {**TRAINING, **training},
        **{name: value for name, value in vars(args).items() if name not in ("methods", "output_dir")},
    }
    path = args.output_dir / f"{method}.json"
    if path.is_file() and (known := json.loads(path.read_text(encoding="utf-8")))["protocol"] == protocol:
        return known
    learner = build_learner(config, seed=args.seed)
    arguments = FewShotTrainingArguments(
        **{**TRAINING, **training}, output_dir=str(args.output_dir / method), seed=args.seed, max_steps=args.max_steps,
        meta_batch_size=args.meta_batch_size, cpu_threads=1,
    )  # fmt: skip
    sampler = SinusoidSampler("train", k_shot=args.k_shot, n_query=args.k_shot, seed=args.seed)
    trainer = FewShotTrainer(learner, arguments, sampler, read_sinusoid)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    params = trainer.detached_params()
    test = {}
    for steps in STEPS:
        rate = best_rate(learner, params, steps, args)
        answered = answers(learner, params, steps, rate, "test", args.k_shot, args.test_episodes)
        diverged = sum(not math.isfinite(loss) for loss in answered.losses)
        interval = None if diverged else mean_interval(answered.losses)
        test[f"{steps}-step"] = {
            "mse": interval and interval.mean,
            "ci95": interval and interval.ci95,
            "diverged": diverged,
            "rate": rate,
            "r2": None if diverged else answered.metrics["r2"],
            "losses": [loss if math.isfinite(loss) else None for loss in answered.losses],
        }
    result = {"protocol": protocol, "seconds": seconds, "test": test}
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def best_rate(learner: BaseLearner, params: Params, steps: int, args: argparse.Namespace) -> float:
    """The step size, or the factor of learned ones, with the least error on validation tasks."""
    shape = ("validation", args.k_shot, args.validation_episodes)
    losses = {rate: answers(learner, params, steps, rate, *shape).loss for rate in rates_of(learner)}
    return min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)


def rates_of(learner: BaseLearner) -> tuple[float, ...]:
    return FACTORS if learner.config.inner_rule == "meta_sgd" else RATES


def answers(
    learner: BaseLearner, params: Params, steps: int, rate: float, split: str, k_shot: int, episodes: int
) -> EvaluationResult:
    """What ``learner`` answers after ``steps`` inner steps."""
    config = replace(learner.config, inner_steps=steps)
    if rates_of(learner) is FACTORS:
        params = {name: rate * value if name.startswith("rule.") else value for name, value in params.items()}
    else:
        config = replace(config, inner_learning_rate=rate)
    sampler = SinusoidSampler(split, k_shot=k_shot, n_query=QUERIES, seed=EVAL_SEED, num_episodes=episodes)
    return evaluate(build_learner(config, learner.model), params, sampler, read_sinusoid)


if __name__ == "__main__":
    main()
