"""A run over a stream of stages, from data sets to an adapter and the accuracy of every stage after every stage.

accelerate launch recipes/lifelong.py --variant naive
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fewshot_nlp.cli.errors import carry_out
from fewshot_nlp.cli.parser import CLASSES, parse_into
from fewshot_nlp.cli.report import drawing
from fewshot_nlp.cli.train import EVAL_SEED, check_tasks
from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.data import (
    EpisodeMixture,
    EpisodeReader,
    EpisodeSampler,
    Pool,
    evaluation_tasks,
    load_pools_from_config,
    training_tasks,
)
from fewshot_nlp.data.config import EpisodeConfig
from fewshot_nlp.data.stages import Stage, all_classes, deal_classes, group_classes, hold_out, read_groups
from fewshot_nlp.evaluation.lifelong import draw_matrix
from fewshot_nlp.hub import AdapterInfo, FewShotAdapter
from fewshot_nlp.hub.card import method_name
from fewshot_nlp.learners import BaseLearner, build_learner
from fewshot_nlp.training import FewShotTrainingArguments
from fewshot_nlp.training.accelerator import build_accelerator
from fewshot_nlp.training.lifelong import LifelongArguments, check_stream, learn_stream
from fewshot_nlp.training.resume import check_output_dir
from fewshot_nlp.training.validation import check_target
from fewshot_nlp.types import EpisodeSpec

#: What a run leaves beside the adapter.
RESULTS, EPISODES = "results.json", "episode_accuracies.json"


class StreamSettings(NamedTuple):
    """Everything that a run over a stream is told."""

    config: FewShotConfig
    episodes: EpisodeConfig
    args: FewShotTrainingArguments
    lifelong: LifelongArguments


@dataclass
class StreamRun:
    """A run whose input was found good.

    Attributes:
        settings: what it was told.
        stages: in the order of learning.
        learner: the method on its model.
        reader: from their texts or images to episodes.
        training: training episodes of each stage.
        held_out: episodes to answer, by number of shots and stage.
    """

    settings: StreamSettings
    stages: list[Stage]
    learner: BaseLearner
    reader: EpisodeReader
    training: dict[str, EpisodeSampler | EpisodeMixture]
    held_out: dict[str, dict[str, list[EpisodeSpec]]]


def main(argv: Sequence[str] | None = None, recipe: str | Path | None = None) -> None:
    """Run from the command line; arguments are those of the process if not given."""
    given = list(sys.argv[1:] if argv is None else argv)
    again = "A stream is learned from its first stage on: give the command again."
    carry_out(lambda: prepare(parse_stream(given, recipe)), execute, again)


def parse_stream(argv: Sequence[str], recipe: str | Path | None = None) -> StreamSettings:
    """The settings of every run, and those of a stream; see ``parse_into``."""
    return StreamSettings(*parse_into((*CLASSES, LifelongArguments), argv, recipe))


def prepare(settings: StreamSettings) -> StreamRun:
    """Check and load everything; nothing is trained yet.

    Raises:
        ValueError, OSError, ImportError: bad input, named with the remedy.
    """
    config, episodes, args, lifelong = settings
    check_tasks(config, episodes)
    accelerator = build_accelerator(args)
    check_output_dir(args, (RESULTS, EPISODES))
    if args.push_to_hub:
        raise ValueError("push_to_hub is not for a stream. Push what it leaves: FewShotAdapter.push_to_hub.")
    if not args.test_episodes:
        raise ValueError("test_episodes=0 leaves nothing of a stream to tell. Set 1 or more.")
    if episodes.clusters_per_class > 1:
        raise ValueError(
            f"clusters_per_class={episodes.clusters_per_class} is not for a stream, whose stages are classes. Leave it "
            f"out."
        )
    if episodes.mixture_dataset_names:
        raise ValueError(
            "mixture_dataset_names is not for a stream, whose data sets arrive one after another. Leave it out, or use "
            "stream_dataset_names."
        )
    for name in ("whiten_features", "center_features"):
        if getattr(config, name):
            raise ValueError(
                f"{name}={getattr(config, name)} is not for a stream, whose classes are not known at its start. Leave "
                f"it out."
            )
    with accelerator.main_process_first():
        stages = hold_out(_arriving(episodes, lifelong), lifelong.held_out, episodes.split_seed)
    check_stream(args, lifelong, [stage.name for stage in stages])
    training = {stage.name: training_tasks(episodes, [stage.pools["train"]], args.seed) for stage in stages}

    def episodes_of(stage: Stage, shot: int) -> list[EpisodeSpec]:
        sampler = evaluation_tasks(episodes, stage.pools[lifelong.evaluate_on], shot, EVAL_SEED)
        return [sampler[i] for i in range(args.test_episodes)]

    held_out = {f"{shot}-shot": {s.name: episodes_of(s, shot) for s in stages} for shot in episodes.eval_k_shots}
    learner = build_learner(config, seed=args.seed)
    pools = [pool for stage in stages for pool in stage.pools.values()]
    reader = EpisodeReader.from_config(config, pools, learner.model.encoder())
    if learner.reads_unlabelled:
        raise ValueError(
            f"learner={config.learner!r} reads texts of another data set without labels, which a stream has not. Use "
            f"another learner."
        )
    check_target(learner, training.values())
    return StreamRun(settings, stages, learner, reader, training, held_out)


def execute(run: StreamRun) -> dict[str, Any]:
    """Learn the stream, save to ``output_dir``, and print what came out.

    Returns:
        What ``results.json`` holds.
    """
    config, episodes, args, lifelong = run.settings
    learner, accelerator = run.learner, build_accelerator(args)
    if accelerator.is_main_process:
        _announce(run)
    output = learn_stream(learner, args, lifelong, run.training, run.reader, run.held_out, accelerator)
    results: dict[str, Any] = {
        "lifelong": {shots: matrix.to_dict() for shots, matrix in output.matrices.items()},
        "variant": lifelong.variant,
        "evaluated_on": lifelong.evaluate_on,
        "training": {
            "steps_per_stage": args.max_steps,
            "losses": output.losses,
            "episodes_remembered": output.remembered if lifelong.variant == "replay" else 0,
        },
    }
    if accelerator.is_main_process:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted({name for stage in run.stages for name in stage.label_names})
        data = list(dict.fromkeys([episodes.dataset_name, *(lifelong.stream_dataset_names or ())]))
        kind = run.stages[0].pools["train"].kind
        info = AdapterInfo(label_names=names, datasets=data, kind=kind, results=results)
        FewShotAdapter(learner, output.params, info).save_pretrained(folder)
        single = {shots: np.round(matrix.accuracies, 4).tolist() for shots, matrix in output.matrices.items()}
        (folder / EPISODES).write_text(json.dumps(single), encoding="utf-8")
        print(f"\n{'':>20}  average  backward  forward  forgetting")
        for shots, matrix in output.matrices.items():
            path = folder / f"accuracy_matrix_{shots}.png"
            with drawing(path):
                draw_matrix(path, matrix, f"{method_name(config)}, {lifelong.variant}, {shots}")
            figures = (matrix.average_accuracy, matrix.backward_transfer, matrix.forward_transfer, matrix.forgetting)
            print(f"{lifelong.variant + ', ' + shots:>20}  " + "  ".join(f"{100 * each.mean:7.1f}" for each in figures))
        print(f"\nSaved in {folder}: the adapter, {RESULTS}, and accuracy_matrix_<k>-shot.png", flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def _arriving(episodes: EpisodeConfig, lifelong: LifelongArguments) -> list[Pool]:
    """One pool a stage."""
    found: list[Pool] = []
    for name in [episodes.dataset_name, *(lifelong.stream_dataset_names or ())]:
        # Texts are held out by stage, so texts that classes share are dealt with there.
        own = replace(episodes, dataset_name=name, duplicates="keep")
        # Of all classes alike, so that a data set of few need not be enough for three splits.
        pool = all_classes(load_pools_from_config(own, split_fractions=(1, 0, 0)))
        if lifelong.stage_file is not None:
            found += group_classes(pool, read_groups(lifelong.stage_file))
        elif lifelong.num_stages == 1:
            found.append(pool)
        else:
            found += group_classes(pool, deal_classes(pool, lifelong.num_stages, episodes.split_seed))
    return found


def _announce(run: StreamRun) -> None:
    config, episodes, args, lifelong = run.settings
    print(f"   stream  {len(run.stages)} stages of {', '.join(str(len(s.label_names)) for s in run.stages)} classes")
    print(f"   method  {method_name(config)}, {lifelong.variant}")
    print(f" training  {args.max_steps} steps a stage, of {args.episodes_per_step} tasks, {episodes.n_way}-way")
    print(
        f" answered  {args.test_episodes} episodes a stage, {lifelong.evaluate_on} {run.reader.encoder.kind}s\n",
        flush=True,
    )
