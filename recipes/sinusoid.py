"""Regression: learn to fit a sine wave from ten points, with MAML (Finn et al. 2017, section 5.1).

    python recipes/sinusoid.py
    python recipes/sinusoid.py --max_steps 10000 --output_dir output/sinusoid_long

Takes one to two minutes on a CPU and needs no data. Prints the mean squared error over 200 unseen sine waves before any
inner step and after one and ten, of the meta-learned network and of its untrained start; leaves the network, with a
model card, and in sinusoid.png one task with its points and fits in output/sinusoid.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers.hf_argparser import string_to_bool

from fewshot_nlp import FewShotAdapter, FewShotConfig, FewShotTrainer, FewShotTrainingArguments, build_learner, evaluate
from fewshot_nlp.cli.errors import refusal
from fewshot_nlp.cli.report import FILES
from fewshot_nlp.data import SinusoidSampler, read_sinusoid
from fewshot_nlp.data.sinusoids import INTERVAL, sinusoid
from fewshot_nlp.evaluation.intervals import mean_interval
from fewshot_nlp.learners import BaseLearner
from fewshot_nlp.training.resume import check_output_dir
from fewshot_nlp.types import Batch, EpisodeSpec, Params

K_SHOT, STEPS = 10, (0, 1, 10)
#: What an earlier run left here is replaced; in a folder that is named, only with --overwrite_output_dir true.
OUTPUT = Path("output/sinusoid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test_episodes", type=int, default=200)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--overwrite_output_dir", type=string_to_bool, nargs="?", const=True)
    args = parser.parse_args()
    folder, overwrite = args.output_dir or OUTPUT, args.overwrite_output_dir

    config = FewShotConfig(
        model_name_or_path="mlp", adapter="full", task="regression", learner="maml", inner_learning_rate=0.01
    )
    learner = build_learner(config, seed=args.seed)
    training = FewShotTrainingArguments(
        str(folder), max_steps=args.max_steps, meta_batch_size=8, learning_rate=0.002, seed=args.seed,
        lr_scheduler_type="cosine", max_grad_norm=10.0, eval_strategy="no", save_strategy="no", logging_steps=250,
        disable_tqdm=True, overwrite_output_dir=args.output_dir is None if overwrite is None else overwrite,
    )  # fmt: skip
    try:
        check_output_dir(training, (*FILES, "sinusoid.png"))
    except ValueError as found:
        raise refusal(found) from found
    trainer = FewShotTrainer(learner, training, SinusoidSampler(k_shot=K_SHOT, seed=args.seed), read_sinusoid)
    trainer.train()
    learned = trainer.detached_params()

    test = [SinusoidSampler("test", k_shot=K_SHOT, n_query=100)[i] for i in range(args.test_episodes)]
    print(f"\nMean squared error of {args.test_episodes} unseen sine waves from {K_SHOT} points ± 95 % interval\n")
    print(f"{'inner steps':12}" + "".join(f"{steps:>16}" for steps in STEPS))
    for name, params in (("untrained", learner.init_params()), ("MAML", learned)):
        print(f"{name:12}" + "".join(f"{error(learner, params, test, steps):>16}" for steps in STEPS))

    FewShotAdapter(learner, learned).save_pretrained(folder)
    draw(folder / "sinusoid.png", learner, learned, test[0])
    print(f"\nSaved to {folder}; the picture is {folder / 'sinusoid.png'}.")


def after(learner: BaseLearner, steps: int) -> BaseLearner:
    """The same learner with another number of inner steps."""
    return build_learner(replace(learner.config, inner_steps=steps), learner.model)


def error(learner: BaseLearner, params: Params, specs: list[EpisodeSpec], steps: int) -> str:
    interval = mean_interval(evaluate(after(learner, steps), params, specs, read_sinusoid).losses)
    return f"{interval.mean:.3f}" + ("" if interval.ci95 is None else f" ± {interval.ci95:.3f}")


def draw(path: Path, learner: BaseLearner, params: Params, spec: EpisodeSpec) -> None:
    """One task: the wave, the points it is learned from, and the fits."""
    (amplitude, phase), support = sinusoid(spec), read_sinusoid(spec).support
    x = torch.linspace(*INTERVAL, 300)
    figure = Figure(figsize=(7.2, 4.4), dpi=160, layout="constrained")
    panel = figure.subplots()
    panel.plot(x, amplitude * torch.sin(x - phase), color="#444444", linewidth=1.4, label="truth")
    for steps, colour, line in zip(STEPS, ("#999999", "#0072B2", "#D55E00"), (":", "--", "-"), strict=True):
        fitted = after(learner, steps)
        state = fitted.adapt(params, support)
        with torch.no_grad():
            y = fitted.predict(params, state, Batch({"values": x[:, None]}, torch.zeros(len(x)), 1))[:, 0]
        label = "before any step" if steps == 0 else f"after {steps} step{'s' if steps > 1 else ''}"
        panel.plot(x, y, color=colour, linestyle=line, linewidth=2.0, label=label)
    panel.scatter(
        support.inputs["values"][:, 0], support.labels, color="black", zorder=3, label=f"{K_SHOT} points given"
    )
    panel.set(xlabel="x", ylabel="y", title=f"y = {amplitude:.2f} sin(x - {phase / math.pi:.2f} π)")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8.5)
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
