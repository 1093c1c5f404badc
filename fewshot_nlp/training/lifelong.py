"""Lifelong learning: stages arrive once, one after another, and the meta-parameters go on learning.

Three ways. *naive*: each stage is trained on from where the last one ended. *replay*: a part of every meta-batch are
tasks of past stages, from a bounded uniform sample of them, a reservoir (Vitter 1985, Algorithm R); what is kept are
addresses of episodes, and the meta-batch is no larger. *ewc*: elastic weight consolidation (Kirkpatrick et al. 2017,
arXiv:1612.00796): where a stage ended, ``θ_s``, with the diagonal Fisher information ``F_s`` estimated from the
gradients ``g_e`` of ``E`` of its episodes, pulls on what comes later::

    F_s = 1/E Σ_e g_e²,    penalty = λ/2 Σ_s Σ F_s (θ - θ_s)²,    its gradient = λ (A θ - B)

with ``A = Σ_s F_s`` and ``B = Σ_s F_s θ_s``, two numbers a parameter however many stages there were. The loss that is
logged leaves the penalty out. For a learner whose meta-gradient is that of no loss, such as Reptile's, ``F`` says how
far tasks move a parameter.

Any learner and any number of processes: each stage is a run of ``FewShotTrainer``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fewshot_nlp.checks import at_least, choice
from fewshot_nlp.data.sampler import below, generator
from fewshot_nlp.evaluation import EvaluationResult
from fewshot_nlp.evaluation.lifelong import AccuracyMatrix
from fewshot_nlp.training.accelerator import build_accelerator
from fewshot_nlp.training.arguments import FewShotTrainingArguments
from fewshot_nlp.training.trainer import FewShotTrainer, Sampler
from fewshot_nlp.training.validation import check_target
from fewshot_nlp.types import Episode, EpisodeSpec, Learner, MetaGrad, Params

VARIANTS = ("naive", "replay", "ewc")
HELD_OUT = ("validation", "test")


@dataclass
class LifelongArguments:
    """What the stream is, and what is done against forgetting."""

    variant: str = field(default="replay", metadata={"help": f"How stages are learned: {', '.join(VARIANTS)}."})
    num_stages: int = field(
        default=5, metadata={"help": "Groups that the classes of each data set are dealt to; 1 streams it whole."}
    )
    stage_file: str | None = field(
        default=None, metadata={"help": "JSON with a list of class names for each stage, in place of num_stages."}
    )
    stream_dataset_names: list[str] | None = field(
        default=None, metadata={"help": "Further data sets that arrive after dataset_name, in this order."}
    )
    held_out: float = field(
        default=0.2, metadata={"help": "Share of each class's texts to test on, and as much again to validate on."}
    )
    evaluate_on: str = field(
        default="test", metadata={"help": f"Held-out texts that are answered: {', '.join(HELD_OUT)}."}
    )
    replay_size: int = field(default=200, metadata={"help": "Most past episodes that variant=replay remembers."})
    replay_share: float = field(
        default=0.5, metadata={"help": "Share of a meta-batch that variant=replay fills with past episodes, rounded."}
    )
    ewc_weight: float = field(
        default=1e6,
        metadata={
            "help": "The λ of variant=ewc. The more parameters share a gradient, the smaller each one's Fisher number, "
            "and the larger λ must be."
        },
    )
    ewc_episodes: int = field(default=50, metadata={"help": "Episodes of a stage that estimate its Fisher matrix."})

    def __post_init__(self) -> None:
        choice("variant", self.variant, VARIANTS)
        choice("evaluate_on", self.evaluate_on, HELD_OUT)
        for name in ("num_stages", "replay_size", "ewc_episodes"):
            at_least(name, getattr(self, name), 1)
        for name in ("held_out", "replay_share"):
            at_least(name, getattr(self, name), 0.0, float, above=True)
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range. Use a share below 1.")
        at_least("ewc_weight", self.ewc_weight, 0.0, float)
        if self.stage_file is not None and self.stream_dataset_names:
            raise ValueError("stage_file groups the classes of one data set. Leave stream_dataset_names out.")


class Reservoir:
    """A uniform sample, of bounded size, of what has passed by; item ``t`` takes a place drawn from ``t + 1``.

    Args:
        size: most items to keep.
        seed: of the draws.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        at_least("replay_size", size, 1)
        self.size, self.seed = size, seed
        self.kept: list[EpisodeSpec] = []
        self.seen = 0

    def add(self, item: EpisodeSpec) -> None:
        place = below(generator("reservoir", self.seed, self.seen), self.seen + 1)
        if self.seen < self.size:
            self.kept.append(item)
        elif place < self.size:
            self.kept[place] = item
        self.seen += 1


class ReplaySampler:
    """``count`` of every ``batch`` episodes are drawn from ``past``, the others are the next of ``fresh``.

    A pure function of the index, as every sampler is: nothing is added to ``past`` while a stage is learned.
    """

    def __init__(self, fresh: Sampler, past: Sequence[EpisodeSpec], batch: int, count: int, seed: int = 0) -> None:
        self.fresh, self.past, self.batch, self.seed = fresh, tuple(past), batch, seed
        self.count = count if self.past else 0

    def __getitem__(self, index: int) -> EpisodeSpec:
        batch, place = divmod(index, self.batch)
        new = self.batch - self.count
        if place < new:
            return self.fresh[batch * new + place]
        return self.past[below(generator("replay", self.seed, index), len(self.past))]

    def fresh_before(self, index: int) -> int:
        """How many episodes of ``fresh`` come before ``index``."""
        batch, place = divmod(index, self.batch)
        new = self.batch - self.count
        return batch * new + min(place, new)


@dataclass
class Consolidation:
    """The penalty of elastic weight consolidation: ``λ``, ``A`` and ``B``."""

    weight: float
    strength: dict[str, Tensor] = field(default_factory=dict)
    pull: dict[str, Tensor] = field(default_factory=dict)

    def gradient(self, name: str, value: Tensor) -> Tensor:
        """``λ (A θ - B)`` of one parameter."""
        return self.weight * (self.strength[name] * value - self.pull[name])

    def after(self, params: Params, fisher: Mapping[str, Tensor]) -> Consolidation:
        """With one stage more, which ended at ``params``."""
        return Consolidation(
            self.weight,
            {name: self.strength.get(name, 0) + fisher[name] for name in params},
            {name: self.pull.get(name, 0) + fisher[name] * value for name, value in params.items()},
        )


class GoingOn:
    """A learner that starts from ``start`` and feels ``consolidation``; all else is the learner's own."""

    def __init__(self, learner: Learner, start: Params, consolidation: Consolidation | None = None) -> None:
        self._learner, self._start, self._consolidation = learner, start, consolidation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)

    def init_params(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._start.items()}

    def meta_grad(self, params: Params, episodes: Sequence[Episode]) -> MetaGrad:
        part = self._learner.meta_grad(params, episodes)
        penalty = self._consolidation
        if penalty is None or not penalty.strength:
            return part
        # Sums over episodes are divided by their number later.
        grads = {n: grad + part.episodes * penalty.gradient(n, params[n]) for n, grad in part.grads.items()}
        return replace(part, grads=grads)


class LifelongOutput(NamedTuple):
    """What ``learn_stream`` answers.

    Attributes:
        params: the meta-parameters after the last stage.
        matrices: accuracies by number of shots.
        final: answers after the last stage to the episodes of all stages, by number of shots.
        losses: mean training loss of each stage.
        remembered: episodes in the reservoir at the end.
    """

    params: dict[str, Tensor]
    matrices: dict[str, AccuracyMatrix]
    final: dict[str, EvaluationResult]
    losses: list[float]
    remembered: int


def learn_stream(
    learner: Learner,
    args: FewShotTrainingArguments,
    lifelong: LifelongArguments,
    training: Mapping[str, Sampler],
    reader: Callable[[EpisodeSpec], Episode],
    held_out: Mapping[str, Mapping[str, Sequence[EpisodeSpec]]],
    accelerator: Accelerator | None = None,
    tell: Callable[[str], None] = print,
) -> LifelongOutput:
    """Train on one stage after another, and answer the held-out episodes of all of them before, between and after.

    Args:
        learner: what is trained.
        args: how; ``max_steps`` are those of a stage, and so is the schedule of the learning rate.
        lifelong: what is done against forgetting.
        training: training episodes of each stage by its name, in the order of learning.
        reader: turns an ``EpisodeSpec`` into an ``Episode``.
        held_out: episodes to answer, by number of shots and stage; as many of each stage.
        accelerator: one that exists already.
        tell: told how far things are, on the main process.

    Raises:
        ValueError: fewer than two stages; settings that a stream has no use for.
    """
    check_stream(args, lifelong, list(training))
    check_target(learner, training.values())
    accelerator = accelerator or build_accelerator(args)
    say = tell if accelerator.is_main_process else lambda text: None
    names = list(training)
    reservoir = Reservoir(lifelong.replay_size, args.seed)
    consolidation = Consolidation(lifelong.ewc_weight) if lifelong.variant == "ewc" else None
    params: Params = learner.init_params()
    answers: dict[str, list[EvaluationResult]] = {shots: [] for shots in held_out}
    losses = []

    def trainer_from(start: Params, sampler: Sampler) -> FewShotTrainer:
        return FewShotTrainer(GoingOn(learner, start, consolidation), args, sampler, reader, accelerator=accelerator)

    def answer(trainer: FewShotTrainer, when: str) -> None:
        for shots, specs in held_out.items():
            every = [spec for name in names for spec in specs[name]]
            answers[shots].append(trainer.evaluate_on(every, learner, trainer.detached_params()))
            say(f"{when}, {shots}: {_percents(_by_stage(answers[shots][-1], len(names)).mean(axis=1))}")

    for number, name in enumerate(names):
        past = reservoir.kept if lifelong.variant == "replay" else ()
        share = round(lifelong.replay_share * args.meta_batch_size)
        sampler = ReplaySampler(training[name], past, args.meta_batch_size, share, args.seed + number)
        trainer = trainer_from(params, sampler)
        if number == 0:
            answer(trainer, "untrained")
        losses.append(trainer.train().training_loss)
        params = {key: value.clone() for key, value in trainer.detached_params().items()}
        used = sampler.fresh_before(args.max_steps * args.episodes_per_step)
        for i in range(used):
            reservoir.add(training[name][i])
        if consolidation is not None and number + 1 < len(names):
            unused = [training[name][i] for i in range(used, used + lifelong.ewc_episodes)]
            consolidation = consolidation.after(params, fisher_diagonal(trainer, learner, unused))
        answer(trainer, f"after {name}")
    matrices = {
        shots: AccuracyMatrix(names, np.stack([_by_stage(each, len(names)) for each in found]))
        for shots, found in answers.items()
    }
    final = {shots: found[-1] for shots, found in answers.items()}
    return LifelongOutput(dict(params), matrices, final, losses, len(reservoir.kept))


def fisher_diagonal(trainer: FewShotTrainer, learner: Learner, specs: Sequence[EpisodeSpec]) -> dict[str, Tensor]:
    """Mean squared gradient of ``specs`` at the trainer's parameters; each rank takes a share."""
    accelerator, params = trainer.accelerator, trainer.detached_params()
    sums = {name: torch.zeros_like(value) for name, value in params.items()}
    for spec in specs[accelerator.process_index :: accelerator.num_processes]:
        with accelerator.autocast():
            part = learner.meta_grad(params, [trainer.reader(spec).to(accelerator.device)])
        for name, grad in part.grads.items():
            sums[name] += grad.square() / len(specs)
    return accelerator.reduce(sums, reduction="sum")


def check_stream(args: FewShotTrainingArguments, lifelong: LifelongArguments, names: Sequence[str]) -> None:
    """Raise ``ValueError`` for settings that a stream has no use for, and where a variant would do nothing."""
    if len(names) < 2:
        raise ValueError(f"A stream of {len(names)} stage has nothing to forget. Set num_stages of 2 or more.")
    wanted = {"eval_strategy": "no", "save_strategy": "no", "resume_from_checkpoint": None}
    for name, value in wanted.items():
        if getattr(args, name) != value:
            raise ValueError(
                f"{name}={getattr(args, name)!r} does not fit a stream, which is evaluated after each stage and saved "
                f"at its end. Set {name}: {value or 'none'}."
            )
    if (
        lifelong.variant == "replay"
        and not 0 < round(lifelong.replay_share * args.meta_batch_size) < args.meta_batch_size
    ):
        raise ValueError(
            f"replay_share={lifelong.replay_share} of meta_batch_size={args.meta_batch_size} leaves no place for past "
            f"or for new episodes. Raise meta_batch_size, or change replay_share."
        )


def _by_stage(result: EvaluationResult, count: int) -> np.ndarray:
    """Accuracies ``[stages, episodes]``."""
    return np.asarray(result.accuracies).reshape(count, -1)


def _percents(values: np.ndarray) -> str:
    return " ".join(f"{100 * value:.1f}" for value in values)
