"""``fewshot-nlp plan``: what a recipe's training steps will take, before any is taken."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import torch

from fewshot_nlp.checks import at_least
from fewshot_nlp.cli.errors import refusal
from fewshot_nlp.cli.parser import Settings, parse
from fewshot_nlp.data import Pool, load_pools_from_config, training_pools_from_config, training_tasks
from fewshot_nlp.learners import build_learner
from fewshot_nlp.learners.planner import Plan, plan
from fewshot_nlp.training.interrupts import leaving_at_once

#: Texts whose lengths stand for the data set's.
SAMPLE = 200
USAGE = "fewshot-nlp plan [RECIPE.yaml] [--memory_gb X] [--NAME VALUE ...]"


def main(argv: Sequence[str]) -> None:
    """``fewshot-nlp plan [recipe.yaml] [--memory_gb X] [--NAME VALUE ...]``, settings as for a run."""
    given = list(argv)
    recipe = given.pop(0) if given and not given[0].startswith("-") else None
    parser = argparse.ArgumentParser(
        prog="fewshot-nlp plan",
        usage=USAGE,
        allow_abbrev=False,
        description="Predict the peak memory and the seconds of a recipe's training steps; takes its settings, too.",
    )
    parser.add_argument("--memory_gb", type=float, help="Propose the fastest way within this memory above the model's.")
    chosen, rest = parser.parse_known_args(given)
    if chosen.memory_gb is not None:
        at_least("memory_gb", chosen.memory_gb, 0.0, float)
    settings = parse(rest, recipe)
    try:
        with leaving_at_once("left without a plan."):
            found, words = predict(settings)
    except RuntimeError as error:
        raise refusal(error) from error
    print(f"{words}\n{found}\n* is what the settings give; memory is above that of the loaded model, per process.")
    if chosen.memory_gb is not None:
        print(f"\nWithin {chosen.memory_gb:g} GB: {found.cheapest(chosen.memory_gb)}")


def predict(settings: Settings) -> tuple[Plan, str]:
    """The plan of a run's largest training episode, and that episode in words."""
    config, episodes, args = settings
    pools = training_pools_from_config(episodes, load_pools_from_config(episodes))
    if episodes.clusters_per_class == 1:
        training_tasks(episodes, pools)  # a plan of what can be trained
    encoder = build_learner(config).model.encoder()
    texts = [text for pool in pools for text in _sample(pool, SAMPLE // len(pools))]
    lengths = [len(ids) for ids in encoder.encode(texts)]
    # Short and long ones mixed, as in episodes.
    random.Random(0).shuffle(lengths)
    n_way, k_shot = episodes.largest
    out_of_scope = -(-episodes.n_out_of_scope // episodes.n_way)
    shape = {"n_way": n_way, "k_shot": k_shot, "n_query": episodes.n_query + out_of_scope}
    device = "cpu" if args.use_cpu else None
    if args.cpu_threads:
        torch.set_num_threads(args.cpu_threads)
    batch = {
        "meta_batch_size": args.meta_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
    }
    found = plan(config, **shape, tokens=lengths, **batch, device=device)
    words = (
        f"{args.episodes_per_step} episodes a step, up to {shape['n_way']}-way {shape['k_shot']}-shot with "
        f"{shape['n_query']} queries a class, texts of {min(lengths)} to {max(lengths)} tokens"
    )
    return found, words


def _sample(pool: Pool, count: int) -> list[str]:
    """Some ``count`` of a pool's texts, evenly over its classes."""
    rows = [row for rows in pool.rows_by_class.values() for row in rows]
    return pool.texts(rows[:: max(1, len(rows) // max(count, 1))])
