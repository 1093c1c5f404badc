"""The run that every recipe makes, from a data set to an adapter that can be loaded, shared and trusted.

fewshot-nlp recipes/prompt_maml.yaml --max_steps 100
accelerate launch recipes/prompt_maml.py --max_steps 100
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor

from fewshot_nlp.checks import printable
from fewshot_nlp.cli import plan
from fewshot_nlp.cli.errors import carry_out
from fewshot_nlp.cli.parser import Settings, parse
from fewshot_nlp.cli.push import claim_repository, push
from fewshot_nlp.cli.report import FILES, announce, conclude, drawing, picture, say_how
from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.data import (
    EpisodeReader,
    EpisodeSampler,
    Pool,
    divide_classes,
    evaluation_tasks,
    find_clusters,
    load_pools_from_config,
    training_pools_from_config,
    training_tasks,
)
from fewshot_nlp.data.config import EpisodeConfig
from fewshot_nlp.evaluation import EvaluationResult, build_protocol, compare
from fewshot_nlp.evaluation.plots import curves_from_log_history, learning_curve
from fewshot_nlp.hub import AdapterInfo, FewShotAdapter
from fewshot_nlp.hub.card import method_name
from fewshot_nlp.hub.info import CURVE_NAME
from fewshot_nlp.learners import BaseLearner, FineTuning, FrozenPrototypes, LogisticRegression, build_learner
from fewshot_nlp.learners.centring import centred
from fewshot_nlp.models.cache import FrozenFeatures
from fewshot_nlp.training import FewShotTrainer, FewShotTrainingArguments
from fewshot_nlp.training.accelerator import build_accelerator
from fewshot_nlp.training.faults import together
from fewshot_nlp.training.resume import check_output_dir, check_resumable, resume_folder
from fewshot_nlp.types import EpisodeSpec, Learner, Params

#: Validation and test episodes do not depend on the seed of training, so that runs with other seeds compare in pairs.
EVAL_SEED = 0
USAGE = f"fewshot-nlp [RECIPE.yaml] [--config FILE] [--NAME VALUE ...]\n       {plan.USAGE}"
ABOUT = (
    "Train and test what RECIPE.yaml says, such as recipes/prompt_maml.yaml; plan predicts the memory and the time of "
    "its training steps, and trains nothing."
)


@dataclass
class Run:
    """A run whose input was found good.

    Attributes:
        settings: what it was told.
        pools: the data set's splits by name.
        training: the classes that training tasks are drawn from, by data set.
        learner: the method on its model.
        trainer: with learner, reader, training and validation episodes.
        test: test episodes by ``"<k>-shot"``.
        checkpoint: the one to go on from.
        clusters: among how many clusters of those classes, where it is not the classes themselves.
        repo_id: full name of the repository to push to, on the main process.
        command: how it was started.
    """

    settings: Settings
    pools: dict[str, Pool]
    training: dict[str, Pool]
    learner: BaseLearner
    trainer: FewShotTrainer
    test: dict[str, EpisodeSampler]
    checkpoint: Path | None = None
    clusters: int = 0
    repo_id: str | None = None
    command: str | None = None


def main(argv: Sequence[str] | None = None, recipe: str | Path | None = None) -> None:
    """Run a recipe from the command line: ``fewshot-nlp [recipe.yaml] [--NAME VALUE ...]``, or plan it:
    ``fewshot-nlp plan [recipe.yaml] [--memory_gb X] [--NAME VALUE ...]``.

    Args:
        argv: arguments; those of the process if not given.
        recipe: the YAML file that a recipe brings; without it, the first argument may name one.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    # A script of recipes/ has its YAML, and takes no other.
    told = {"usage": USAGE, "about": ABOUT} if recipe is None else {}
    command = shlex.join(["fewshot-nlp", *given] if recipe is None else [*_launcher(recipe), *given])
    if recipe is None and given and not given[0].startswith("-"):
        recipe = given.pop(0)
    if recipe is None and not given:
        raise SystemExit(
            "error: No recipe and no setting is given. Use fewshot-nlp <recipe.yaml> [--NAME VALUE ...], fewshot-nlp "
            "plan <recipe.yaml>, or fewshot-nlp --help."
        )
    if recipe == "plan":
        return carry_out(lambda: plan.main(given), lambda _: None, "")
    again = "Go on with the same command and --resume_from_checkpoint true."
    return carry_out(lambda: prepare(parse(given, recipe, **told), command), execute, again)


def prepare(settings: Settings, command: str | None = None) -> Run:
    """Check and load everything; nothing is trained yet.

    Raises:
        ValueError, OSError, ImportError: bad input, named with the remedy.
    """
    config, episodes, args = settings
    check_tasks(config, episodes)
    if episodes.clusters_per_class > 1 and config.head == "verbalizer":
        raise ValueError(
            f"clusters_per_class={episodes.clusters_per_class} makes several classes of one name, and "
            f"head='verbalizer' answers by name. Use head='prototype' or 'linear', or leave out clusters_per_class."
        )
    accelerator = build_accelerator(args)
    checkpoint = resume_folder(args, None)
    check_output_dir(args, FILES, resumed=checkpoint is not None)

    # Data: pools of classes, and the addresses of episodes.
    with accelerator.main_process_first():
        pools = load_pools_from_config(episodes)
        training = training_pools_from_config(episodes, pools)
    # What cannot fill an episode is said before a model is loaded; clusters are of its features.
    train = training_tasks(episodes, training, args.seed) if episodes.clusters_per_class == 1 else None

    def samplers(split: str, setting: str) -> dict[str, EpisodeSampler]:
        pool = _split(pools, split, setting)
        return {f"{shot}-shot": evaluation_tasks(episodes, pool, shot, EVAL_SEED) for shot in episodes.eval_k_shots}

    validation = samplers("validation", "eval_strategy: no") if args.eval_strategy != "no" else {}
    test = samplers("test", "test_episodes: 0") if args.test_episodes else {}

    # Model: backbone, adapter, head and method in one learner.
    learner = build_learner(config, seed=args.seed)
    learner.model.to(accelerator.device)

    def reading(drawn: Sequence[Pool]) -> EpisodeReader:
        return EpisodeReader.from_config(
            config,
            [*pools.values(), *drawn],
            learner.model.encoder(),
            unlabelled=_split(pools, "train", "n_unlabelled: 0") if episodes.n_unlabelled else None,
            n_unlabelled=episodes.n_unlabelled,
        )

    reader, finer = reading(training), []
    if train is None:
        finer = _finer(training, settings, learner, accelerator)
        train, reader = training_tasks(episodes, finer, args.seed), reading(finer)
    start = centred(learner, learner.init_params(), training, args.seed)
    trainer = FewShotTrainer(learner, args, train, reader, validation, accelerator=accelerator, params=start)
    if checkpoint is not None:
        check_resumable(trainer, checkpoint)
    repo_id = claim_repository(args) if args.push_to_hub and accelerator.is_main_process else None
    return Run(
        settings=settings,
        pools=pools,
        training={pool.name: pool for pool in training},
        learner=learner,
        trainer=trainer,
        test=test,
        checkpoint=checkpoint,
        clusters=sum(len(pool.label_names) for pool in finer),
        repo_id=repo_id,
        command=command,
    )


def check_tasks(config: FewShotConfig, episodes: EpisodeConfig) -> None:
    """Raise ``ValueError`` for tasks that a data set of classes cannot give."""
    if config.task != "classification":
        raise ValueError(
            f"task={config.task!r} is not for this command, whose data have classes. Train it in Python, as "
            f"recipes/sinusoid.py does."
        )
    if 0 in episodes.eval_k_shots and not config.tells_names:
        raise ValueError(
            f"eval_k_shots={episodes.eval_k_shots} has tasks without examples, and nothing else tells their classes. "
            f"Set use_label_names, without names_in_training_alone, or leave 0 out."
        )


def execute(run: Run) -> dict[str, Any]:
    """Train, test against the baselines on held-out classes, save to ``output_dir``, and print what came out.

    Returns:
        What ``results.json`` holds.
    """
    episodes, args = run.settings.episodes, run.settings.args
    learner, trainer, accelerator = run.learner, run.trainer, run.trainer.accelerator
    is_main = accelerator.is_main_process
    if is_main:
        announce(run.settings, run.pools, run.training, learner, trainer, run.clusters)
    output = trainer.train(run.checkpoint or False)
    trained = FewShotAdapter(learner, _final_params(run))

    # Test: the learner and the baselines on the same episodes of classes that were never trained on.
    baselines = baselines_of(learner, args)
    levels = {name: trainer.evaluate_on(specs, baselines["prototypes"]) for name, specs in trainer.eval_specs.items()}
    if is_main and run.test:
        classes = set(run.pools["test"].label_names)
        unseen = " that were not seen in training" if classes.isdisjoint(_label_names(run.training)) else ""
        print(f"\nTesting on {len(classes)} classes{unseen}", flush=True)
    results: dict[str, Any] = {
        "protocol": build_protocol(
            run.pools,
            n_way=episodes.eval_n_way or episodes.n_way,
            shots=episodes.eval_k_shots,
            n_query=episodes.eval_n_query,
            n_out_of_scope=episodes.eval_n_out_of_scope,
            episodes=args.test_episodes,
            seed=EVAL_SEED,
            transductive=learner.transductive,
            uses_label_names=learner.config.tells_names,
            samplers=run.test,
            baselines={name: each.settings for name, each in baselines.items() if isinstance(each, FineTuning)},
            training=run.training,
            unlabelled=run.pools["train"] if episodes.n_unlabelled else None,
        )
        if run.test
        else {},
        "test": tested(run, baselines, trained),
        "training": {
            "steps": output.global_step,
            "best_step": trainer.state.best_global_step,
            "episodes": output.global_step * args.episodes_per_step,
            **output.metrics,
        },
    }

    if is_main:
        info = AdapterInfo(
            label_names=_label_names(run.training),
            datasets=list(run.training),
            kind=next(iter(run.training.values())).kind,
            hub_datasets=[pool.hub_id for pool in run.training.values() if pool.hub_id],
            language=_languages(run),
            results=results,
            command=run.command,
        )
        with drawing(Path(args.output_dir) / CURVE_NAME):
            info.learning_curve = _draw(run, {name: result.accuracy for name, result in levels.items()})
        trained.info = info
        trained.save_pretrained(args.output_dir)
        if run.test and run.pools["test"].kind == "image":
            picture(Path(args.output_dir) / "episode.png", run.settings, trainer, trained, run.test, run.pools["test"])
        conclude(run.settings, results)
        if run.repo_id is not None:
            push(trained, run.repo_id, args)
        say_how(run.repo_id or args.output_dir, info.kind)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def _final_params(run: Run) -> dict[str, Tensor]:
    """What is tested and kept. Trained features are not what they were: where they are whitened, the first process
    finds their centre and covariance anew."""
    learner, trainer, args = run.learner, run.trainer, run.settings.args
    params = trainer.detached_params()
    if not learner.config.whiten_features:
        return params
    if trainer.accelerator.is_main_process:
        try:
            params = centred(learner, params, list(run.training.values()), args.seed)
        except ValueError as error:
            raise FloatingPointError(f"Training made all features alike. {error}") from error
    with together(trainer.accelerator, args.ddp_timeout):
        return broadcast(params)


def baselines_of(learner: BaseLearner, args: FewShotTrainingArguments) -> dict[str, Learner]:
    """What the result is shown beside; every one of them starts from the untrained backbone."""
    frozen = FrozenFeatures(learner.model), learner.config.label_name_weight
    found: dict[str, Learner] = {
        "prototypes": FrozenPrototypes(*frozen),
        "logistic_regression": LogisticRegression(*frozen),
    }
    if learner.config.head == "verbalizer":
        # It has answers before any training.
        found["untrained"] = learner
    if learner.model.trainable:
        found["fine_tuning"] = FineTuning.like(learner, args.baseline_steps, args.baseline_learning_rate)
    return found


def tested(run: Run, baselines: Mapping[str, Learner], adapter: FewShotAdapter) -> dict[str, Any]:
    """By number of shots: the trained ``adapter``, and the baselines on the same episodes."""
    return {name: _test(run.trainer, name, sampler, baselines, adapter) for name, sampler in run.test.items()}


def _test(
    trainer: FewShotTrainer,
    name: str,
    sampler: EpisodeSampler,
    baselines: Mapping[str, Learner],
    adapter: FewShotAdapter,
) -> dict[str, Any]:
    specs = [sampler[i] for i in range(trainer.args.test_episodes)]

    def answer(
        method: str, specs: list[EpisodeSpec], learner: Learner | None = None, params: Params | None = None
    ) -> EvaluationResult:
        if trainer.accelerator.is_main_process:
            print(f"  {name}, {method}", flush=True)
        device = trainer.accelerator.device
        start = None if params is None else {key: value.to(device) for key, value in params.items()}
        return trainer.evaluate_on(specs, learner, start, progress=not trainer.args.disable_tqdm)

    result = answer("the trained learner", specs, adapter.learner, adapter.params)
    answers = {}
    for baseline, learner in baselines.items():
        # Fine-tuning takes many steps a task.
        share = specs[: trainer.args.baseline_episodes] if baseline == "fine_tuning" else specs
        if share:
            answers[baseline] = answer(baseline, share, learner, learner.init_params())
    return compare(result, answers)


def _draw(run: Run, baselines: Mapping[str, float]) -> bytes | None:
    """The learning curve as a PNG, with the untrained accuracies on the same validation episodes; nothing without a
    log."""
    accuracy, loss = curves_from_log_history(run.trainer.state.log_history)
    if not accuracy:
        return None
    one = len(baselines) == 1
    levels = {f"untrained prototypes, validation{'' if one else f', {name}'}": v for name, v in baselines.items()}
    title = printable(f"{method_name(run.settings.config)}, {', '.join(run.training)}")
    with tempfile.TemporaryDirectory() as folder:
        path = learning_curve(Path(folder) / CURVE_NAME, accuracy, baselines=levels, loss=loss, title=title)
        return path.read_bytes()


def _label_names(training: Mapping[str, Pool]) -> list[str]:
    """The classes that training tasks are made of."""
    return sorted({name for pool in training.values() for name in pool.label_names})


def _languages(run: Run) -> list[str]:
    """Of the training texts, where they are known."""
    episodes = run.settings.episodes
    names = [episodes.dataset_name, *(episodes.mixture_dataset_names or ())]
    weights = episodes.mixture_weights or [1.0] * len(names)
    read = [*run.training.values(), *([run.pools["train"]] if episodes.n_unlabelled else [])]
    own = all(name == "home_intents" for name, weight in zip(names, weights, strict=True) if weight)
    return sorted({pool.config_name for pool in read if pool.config_name}) if own else []


def _split(pools: Mapping[str, Pool], split: str, setting: str) -> Pool:
    if split not in pools:
        raise ValueError(f"The data set has no {split} classes, only {', '.join(pools)}. Give some, or set {setting}.")
    return pools[split]


def _finer(training: Sequence[Pool], settings: Settings, learner: BaseLearner, accelerator: Accelerator) -> list[Pool]:
    """The training pools with clusters for classes, which the main process finds for all."""
    _, episodes, args = settings
    found: list[dict[str, tuple[int, ...]]] = [{} for _ in training]
    if accelerator.is_main_process:
        features = FrozenFeatures(learner.model).embed
        taken = episodes.largest[1] + episodes.n_query
        for i, pool in enumerate(training):
            found[i] = find_clusters(pool, features, episodes.clusters_per_class, min_examples=taken, seed=args.seed)
    with together(accelerator, args.ddp_timeout):
        broadcast_object_list(found)
    return [divide_classes(pool, clusters) for pool, clusters in zip(training, found, strict=True)]


def _launcher(recipe: str | Path) -> list[str]:
    """``accelerate launch recipes/<name>.py`` for the YAML of that recipe."""
    script = Path(recipe).with_suffix(".py")
    return ["accelerate", "launch", f"{script.parent.name}/{script.name}"]
