"""What a run prints: before training what will happen, after it what came out and what to do with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fewshot_nlp.checks import first_line, printable
from fewshot_nlp.cli.parser import Settings
from fewshot_nlp.data import EpisodeSampler, Pool
from fewshot_nlp.evaluation import results_table
from fewshot_nlp.evaluation.pictures import draw_episode
from fewshot_nlp.hub import FewShotAdapter
from fewshot_nlp.hub.card import method_name
from fewshot_nlp.learners import BaseLearner, GradientLearner
from fewshot_nlp.models.model import NAME_TOKENS
from fewshot_nlp.training import FewShotTrainer
from fewshot_nlp.types import Batch

#: What a reader of a terminal takes in at a glance; the rest is in the folder.
FILES = {
    "adapter_model.safetensors": "the adapter, in PEFT's format",
    "model.safetensors": "the backbone, all of it trained",
    "results.json": "these numbers, and how they were measured",
    "episode.png": "a test task, with right and wrong answers marked",
    "learning_curve.png": "training and validation, step by step",
    "README.md": "a model card for the Hub",
}


def announce(
    settings: Settings,
    pools: Mapping[str, Pool],
    training: Mapping[str, Pool],
    learner: BaseLearner,
    trainer: FewShotTrainer,
    clusters: int = 0,
) -> None:
    """Print data, model, method and length of the run, and how many clusters its tasks are drawn among, if any."""
    config, episodes, args = settings
    params, accelerator = trainer.params, trainer.accelerator
    splits = ", ".join(f"{len(pool.label_names)} {split}" for split, pool in pools.items())
    examples = sum(len(pool) for pool in pools.values())
    first = next(iter(pools.values()))
    name = first.name
    mixture = ", ".join(f"{pool.name} ({len(pool.label_names)} classes)" for pool in training.values())
    adapter = _adapter(settings)
    trained = sum(value.numel() for value in params.values())
    shots = f"{episodes.k_shot}" + (f" to {episodes.max_k_shot}" if episodes.max_k_shot else "")
    ways = f"{episodes.n_way}" + (f" to {episodes.max_n_way}" if episodes.max_n_way else "")
    shots += "-shot, class names are known" if config.tells_names else "-shot"
    processes = accelerator.num_processes
    where = f"{accelerator.device.type}, {processes} process{'es' if processes > 1 else ''}"
    # A launcher may have said so, too.
    where += f", {accelerator.mixed_precision}" if accelerator.mixed_precision != "no" else ""
    together = args.meta_batch_size / processes
    gradient = ""
    if isinstance(learner, GradientLearner):
        with accelerator.autocast():
            gradient = _gradient(settings, learner, together)
    lines = {
        "data": f"{name}: {examples:,} {first.kind}s; classes: {splits}, none shared",
        **({"mixture": f"training tasks from {mixture}"} if list(training) != [name] else {}),
        **({"clusters": f"training tasks among {clusters:,} clusters of the training classes"} if clusters else {}),
        "backbone": f"{config.model_name_or_path}, frozen" if config.adapter != "full" else config.model_name_or_path,
        "adapter": f"{adapter}; {trained:,} trained parameters",
        "method": method_name(config)
        # A method may imply its head, and its steps.
        + (f", {learner.config.head} head" if learner.uses_head else "")
        + (f", {learner.config.inner_steps} inner steps" if isinstance(learner, GradientLearner) else ""),
        **({"gradient": gradient} if gradient else {}),
        "training": f"{args.max_steps} steps of {args.episodes_per_step} tasks, {ways}-way {shots}; {where}",
    }
    for title, text in lines.items():
        print(f"{title:>9}  {printable(text)}")
    print(flush=True)


def conclude(settings: Settings, results: Mapping[str, Any]) -> None:
    """Print the table, and where the files are."""
    folder = Path(settings.args.output_dir)
    print()
    if results["test"]:
        print(results_table(results["test"], name=method_name(settings.config)))
        print()
    print(f"Saved in {folder}:")
    for name, meaning in FILES.items():
        if (folder / name).is_file():
            print(f"  {name:<26} {meaning}", flush=True)


def say_how(source: str | Path, kind: str) -> None:
    """Print how to load an adapter from ``source``, and to use it on what it was trained for, texts or images."""
    print(
        "\nUse it on labels of your own:\n\n"
        "  from fewshot_nlp import FewShotClassifier\n"
        f'  classifier = FewShotClassifier.from_pretrained("{source}").fit({kind}s, labels)\n'
        f"  classifier.predict(new_{kind}s)",
        flush=True,
    )


def picture(
    path: Path,
    settings: Settings,
    trainer: FewShotTrainer,
    trained: FewShotAdapter,
    test: Mapping[str, EpisodeSampler],
    pool: Pool,
) -> None:
    """Draw the first test task of images: what was learned from, and what was answered."""
    shots, sampler = next(iter(test.items()))
    title = printable(f"{method_name(settings.config)}, {pool.name}, {shots}")
    with drawing(path):
        draw_episode(path, trained.learner, trained.params, sampler[0], trainer.reader, pool, title)


@contextmanager
def drawing(path: Path) -> Iterator[None]:
    """A block that draws a picture: one that cannot be drawn, whatever the reason, takes nothing else with it."""
    try:
        yield
    except Exception as error:
        path.unlink(missing_ok=True)
        warnings.warn(f"{path} cannot be drawn: {first_line(error)} All else is as it would be.", stacklevel=3)


def _gradient(settings: Settings, learner: GradientLearner, together: float) -> str:
    """How the meta-gradient of so many of the largest tasks is computed."""
    n_way, k_shot = settings.episodes.largest
    encoder = learner.model.encoder()
    if encoder.kind == "image":
        inputs = encoder([Image.new("L", (1, 1))] * (n_way * k_shot))
    else:
        inputs = learner.model.any_texts(n_way * k_shot, settings.config.max_length)
    support = Batch(inputs, torch.zeros(n_way * k_shot, dtype=torch.long), n_way)
    if learner.asks:
        support = support.asked(learner.model.any_texts(n_way, NAME_TOKENS))
    return learner.describe(support.to(learner.model.device), int(together) if together % 1 == 0 else 1)


def _adapter(settings: Settings) -> str:
    config = settings.config
    if config.adapter in ("prompt_tuning", "p_tuning", "prefix_tuning"):
        return f"{config.adapter} of {config.num_virtual_tokens} virtual tokens"
    if config.adapter != "lora":
        return config.adapter
    kind = f"{'rank-stabilised ' if config.use_rslora else ''}{'dora' if config.use_dora else 'lora'}"
    return f"{kind} of rank {config.lora_r}"
