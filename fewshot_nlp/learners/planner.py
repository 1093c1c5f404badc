"""What a training step will take, in memory and seconds, before one is taken.

An inner loop is a start and one price a step, so two short loops tell what a long one takes. They are run in a process
of their own, on random tokens of the shape to come: only there is the peak of memory theirs, what the allocator wastes
included. No data is needed, and nothing is trained.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from fewshot_nlp.checks import at_least
from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.data.encode import labelled
from fewshot_nlp.functional.memory import forget_peak, peak, resident
from fewshot_nlp.learners import build_learner
from fewshot_nlp.learners.base import BaseLearner
from fewshot_nlp.learners.gradient import GradientLearner
from fewshot_nlp.models.model import NAME_TOKENS
from fewshot_nlp.types import Batch, Episode, EpisodeSpec

#: Lengths of the two short loops, and how often each is timed once its memory is known.
SHORT, LONG, TURNS = 2, 6, 3
#: Memory that no graph of a short loop reaches.
AMPLE_GB = 1e6
#: Estimators whose memory follows from how many steps' graphs are kept, and cheaper ones to propose instead.
GRAPHS, CHEAPER = ("exact", "truncated"), ("reptile", "first_order")


@dataclass(frozen=True)
class Option:
    """One way to take a training step.

    Attributes:
        estimator: of the meta-gradient; ``None`` for learners without an inner loop.
        steps_in_memory: inner steps whose graphs are in memory together.
        memory_gb: peak memory above that of the loaded model, in GiB.
        seconds: for one training step of all its episodes, on one process.
        tasks_at_once: episodes whose gradients are computed together, in one stack or side by side on a CPU's cores.
    """

    estimator: str | None
    steps_in_memory: int | None
    memory_gb: float
    seconds: float
    tasks_at_once: int = 1

    def __str__(self) -> str:
        words = (self.estimator or "one pass").replace("_", " ")
        if self.steps_in_memory is not None:
            words += f", {self.steps_in_memory} inner steps in memory"
        if self.tasks_at_once > 1:
            words += f", {self.tasks_at_once} tasks at once"
        return f"{words}: {self.memory_gb:.2f} GB, {self.seconds:.2f} s a step"


@dataclass(frozen=True)
class Plan:
    """What training will take.

    Attributes:
        chosen: as the settings have it.
        options: other ways to the same meta-gradient, the chosen one among them, and cheaper estimates of it.
    """

    chosen: Option
    options: tuple[Option, ...]

    def cheapest(self, memory_gb: float) -> Option:
        """The fastest option within ``memory_gb``; a cheaper estimate of the gradient only where its own never fits.

        Raises:
            ValueError: nothing fits.
        """
        at_least("memory_gb", memory_gb, 0.0, float)
        fitting = [option for option in self.options if option.memory_gb <= memory_gb]
        if not fitting:
            least = min(self.options, key=lambda option: option.memory_gb)
            raise ValueError(
                f"Nothing fits memory_gb={memory_gb}: the least is {least.memory_gb:.2f} GB ({least}). Use fewer "
                f"examples an episode, shorter texts, or a smaller backbone."
            )
        own = [option for option in fitting if option.estimator == self.chosen.estimator]
        return min(own or fitting, key=lambda option: option.seconds)

    def __str__(self) -> str:
        return "\n".join(f"{'*' if option == self.chosen else ' '} {option}" for option in self.options)


def plan(
    config: FewShotConfig,
    *,
    n_way: int = 5,
    k_shot: int = 5,
    n_query: int = 5,
    tokens: int | Sequence[int] = 16,
    meta_batch_size: int = 4,
    gradient_accumulation_steps: int = 1,
    device: str | None = None,
) -> Plan:
    """Predict the peak memory and the seconds of a training step.

    Args:
        config: backbone, adapter and learner.
        n_way, k_shot, n_query: shape of an episode; query examples a class.
        tokens: length of texts in tokens; of several, the examples take them in turn. Longer ones are cut to
            ``config.max_length``.
        meta_batch_size: episodes on this process whose gradients are computed together.
        gradient_accumulation_steps: how often that is, in a training step.
        device: where training will run; the GPU if there is one, by default.

    Mixed precision and PEFT configuration objects are not planned for.

    Raises:
        ValueError, OSError: a number out of range, or settings of which no learner can be built.
        RuntimeError: the short loops failed; their last words are in the message.
    """
    for name, value, low in (("n_way", n_way, 2), ("k_shot", k_shot, 1), ("n_query", n_query, 1)):
        at_least(name, value, low)
    at_least("meta_batch_size", meta_batch_size, 1)
    at_least("gradient_accumulation_steps", gradient_accumulation_steps, 1)
    lengths = [tokens] if isinstance(tokens, int) else list(tokens)
    for length in lengths or [0]:
        at_least("tokens", length, 1)
    lengths = [min(length, config.max_length) for length in lengths]
    shape = {"n_way": n_way, "k_shot": k_shot, "n_query": n_query, "lengths": lengths}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    task = {
        "config": config.to_dict(),
        "shape": shape,
        "episodes": meta_batch_size,
        "device": device,
        "threads": torch.get_num_threads(),
    }
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__], input=json.dumps(task), capture_output=True, text=True
    )
    if run.returncode < 0:
        raise RuntimeError("The planner's trial was killed, most likely for want of memory. Plan a smaller setting.")
    if run.returncode:
        raise RuntimeError(f"The planner's trial failed: {(run.stderr.strip() or 'no reason given').splitlines()[-1]}")
    trial = json.loads(run.stdout.splitlines()[-1])
    if "refused" in trial:
        raise (OSError if trial["kind"] == "OSError" else ValueError)(trial["refused"])
    return _plan(config, trial, meta_batch_size, gradient_accumulation_steps)


@dataclass(frozen=True)
class Trial:
    """Figures of short loops.

    Attributes:
        estimators: points of each estimator by its name, the configured one first: a number of ``steps``, and what a
            loop of so many takes.
        parameter_bytes: of all that is trained.
        left_bytes: what the first step ever leaves in memory.
        fast_bytes: of the fast weights, which are kept for steps that are to run again.
        links: of an adaptation; each but those in memory runs again.
        steps_in_memory, tasks_at_once: as the settings have it.
        most_at_once: tasks that more memory would let go together.
    """

    estimators: dict[str, list[dict[str, float]]]
    parameter_bytes: float
    left_bytes: float
    fast_bytes: float = 0
    links: int = 1
    steps_in_memory: int = 1
    tasks_at_once: int = 1
    most_at_once: int = 1


@dataclass(frozen=True)
class Line:
    """What a start takes, and each step."""

    start: float
    step: float

    @classmethod
    def through(cls, points: Sequence[dict[str, float]], what: str) -> Line:
        """The line through ``what`` of one point or two, in the order of their steps."""
        steps, rise = (points[-1][name] - points[0][name] for name in ("steps", what))
        step = max(rise / steps, 0.0) if steps else 0.0
        return cls(points[0][what] - step * points[0]["steps"], step)

    def at(self, steps: int) -> float:
        return self.start + self.step * steps


def _plan(config: FewShotConfig, found: dict[str, Any], episodes: int, rounds: int = 1) -> Plan:
    """From the figures of short loops, those of a ``Trial``, to those of the loops that training has."""
    trial, steps, options = Trial(**found), config.inner_steps, list[Option]()
    own, together = min(trial.steps_in_memory, steps), trial.most_at_once
    # Beside what a step takes: the parameters that are trained, and the two moments of Adam.
    beside = 3 * trial.parameter_bytes + trial.left_bytes
    for estimator, points in trial.estimators.items():
        memory, seconds, again = (Line.through(points, what) for what in ("bytes", "seconds", "adapt_seconds"))
        graphs, name = estimator in GRAPHS and steps > 1, None if estimator == "none" else estimator
        for size in sorted({own, steps, -(-steps // 2), 1}) if graphs else [None]:
            # From a blind head, the first link has two steps, which never run again one by one.
            held, twice = (steps, 0) if size is None else (size, max(trial.links - size, 0))
            # Every step that is run again starts from fast weights that were kept.
            gigabytes = (memory.at(held) + trial.fast_bytes * twice + beside) / 2**30
            each = seconds.at(steps) + again.step * twice
            options.append(Option(name, size, gigabytes, each * episodes * rounds))
        if together > 1:
            memory, seconds = (Line.through(points, f"together_{what}") for what in ("bytes", "seconds"))
            # No two go together that are of different micro-rounds.
            total = seconds.at(steps) * -(-episodes // together) * rounds
            gigabytes = (memory.at(steps) + beside) / 2**30
            options.append(Option(name, steps if graphs else None, gigabytes, total, together))
    first = options[0].estimator
    same = [each for each in options if (each.estimator, each.tasks_at_once) == (first, trial.tasks_at_once)]
    chosen = next(option for option in same if option.tasks_at_once > 1 or option.steps_in_memory in (None, own))
    return Plan(chosen, tuple(options))


def example_episode(
    learner: BaseLearner, n_way: int, k_shot: int, n_query: int, lengths: Sequence[int] = (16,), seed: int = 0
) -> Episode:
    """An episode of random tokens, whose texts have ``lengths`` in turn; with names, where the learner reads them."""
    rng, endless = torch.Generator().manual_seed(seed), cycle(lengths)
    vocabulary = int(learner.model.module.config.vocab_size)

    def batch(count: int, names: int = 0) -> Batch:
        own = torch.tensor(list(islice(endless, n_way * (count + names))))
        if learner.config.head == "verbalizer":
            # What is said for a class, and not a text.
            own[n_way * count :].clamp_(max=NAME_TOKENS)
        mask = (torch.arange(int(own.max()))[None] < own[:, None]).long()
        ids = torch.randint(vocabulary, mask.shape, generator=rng) * mask
        if learner.config.head == "verbalizer":
            ids[: n_way * count, 0] = learner.model.any_texts(1, 1)["input_ids"].cpu()
        inputs, labels = {"input_ids": ids, "attention_mask": mask}, torch.arange(n_way).repeat_interleave(count)
        if learner.config.task == "regression":
            return Batch(inputs, labels.float(), 1).to(learner.model.device)
        return labelled(inputs, labels, n_way).to(learner.model.device)

    classes = tuple(f"class {i}" for i in range(n_way))
    support = batch(k_shot, names=int(learner.config.use_label_names))
    parts = [support, batch(n_query), *([batch(n_query)] if learner.reads_unlabelled else [])]
    return Episode(EpisodeSpec("train", 0, "planner", classes, (), ()), *parts)


def _trial(config: FewShotConfig, shape: dict[str, Any], episodes: int, device: str) -> dict[str, Any]:
    """A ``Trial`` of the configured estimator and of cheaper ones: bytes above the loaded model, and seconds."""
    learner = build_learner(config)
    learner.model.to(device)
    params = learner.init_params()
    episode = example_episode(learner, **shape)
    # What the first pass ever brings into memory, weights from their file above all, is the model's.
    learner.model.features(params, example_episode(learner, 2, 1, 1).support.inputs)
    forget_peak(device)
    idle = resident(device)
    trained = sum(value.nbytes for value in params.values())
    if not isinstance(learner, GradientLearner):
        left = _left_behind(learner, params, [episode], device, idle)
        return asdict(Trial({"none": _points([(learner, 0)], [episode], device)}, trained, left))
    estimator, steps = learner.estimator_name, config.inner_steps
    support = learner._known(episode.support)
    held, links = learner.chunk or learner.steps_in_memory(support, episode.query), len(learner.links(support))
    own = most = learner.tasks_at_once([episode] * episodes)
    fast = sum(value.nbytes for value in learner.adapt(params, episode.support).values())
    loops: dict[str, list[tuple[GradientLearner, int]]] = {}
    cheaper = [each for each in CHEAPER if estimator in GRAPHS and _takes(learner, each)]
    for each in dict.fromkeys((*cheaper, estimator)):
        for count in sorted({min(steps, SHORT), min(steps, LONG)}):
            weights = None if each == "reptile" or not config.step_loss_weights else [1.0] * count
            settings = replace(
                config, inner_steps=count, estimator=each, step_loss_weights=weights, graph_memory_gb=AMPLE_GB
            )
            shorter = type(learner)(settings, learner.model)
            shorter.chunk = max(count, 1)
            loops.setdefault(each, []).append((shorter, count))
    # As many as the settings have; side by side, where memory lets them have one, as many as more of it would.
    if most == 1 and not learner.stackable:
        most = loops[estimator][0][0].tasks_at_once([episode] * episodes)
    several = [episode, *(example_episode(learner, **shape, seed=seed) for seed in range(1, most))]
    left = _left_behind(loops[estimator][0][0], params, several, device, idle)
    tried = {each: _points(loops[each], several, device) for each in loops}
    return asdict(Trial({estimator: tried[estimator], **tried}, trained, left, fast, links, held, own, most))


def _takes(learner: BaseLearner, estimator: str) -> bool:
    """Whether the method can be trained by ``estimator``: Reptile has nothing to say of what no task changes."""
    try:
        type(learner)(replace(learner.config, estimator=estimator, step_loss_weights=None), learner.model)
    except ValueError:
        return False
    return True


def _left_behind(
    learner: BaseLearner, params: dict[str, Tensor], episodes: list[Episode], device: str, idle: int
) -> int:
    """Bytes that the first step ever leaves in memory, above ``idle``: buffers of libraries and of threads."""
    _gradient(learner, params, episodes)
    forget_peak(device)
    return max(resident(device) - idle, 0)


def _points(loops: Sequence[tuple[BaseLearner, int]], episodes: list[Episode], device: str) -> list[dict[str, float]]:
    """What the first episode's gradient takes, its adaptation alone, and the gradients of all ``episodes`` together, if
    there are several, for each of ``loops`` and its number of steps."""
    points: list[dict[str, float]] = []
    runs: list[dict[str, Callable[[], object]]] = []
    for learner, steps in loops:
        params = learner.init_params()
        run: dict[str, Callable[[], object]] = {"": partial(_gradient, learner, params, episodes[:1])}
        if len(episodes) > 1:
            run["together_"] = partial(_gradient, learner, params, episodes)
        points.append({"steps": steps})
        for what, work in run.items():
            forget_peak(device)
            before = resident(device)
            work()
            # A second step finds what the first one left in the allocator, in pieces.
            points[-1][f"{what}seconds"] = _seconds(work)
            points[-1][f"{what}bytes"] = peak(device) - before
        runs.append({**run, "adapt_": partial(_adapt, learner, params, episodes[0])})
    # In turns, and the fastest of each: what else the machine does only ever adds, and not to all alike.
    for _ in range(TURNS):
        for point, run in zip(points, runs, strict=True):
            for what, work in run.items():
                point[f"{what}seconds"] = min(_seconds(work), point.get(f"{what}seconds", math.inf))
    return points


def _gradient(learner: BaseLearner, params: dict[str, Tensor], episodes: list[Episode]) -> object:
    if learner.model.trunk is not None:
        # The texts of a training step are new, at first.
        learner.model.trunk.forget()
    return learner.meta_grad(params, episodes)


def _adapt(learner: BaseLearner, params: dict[str, Tensor], episode: Episode) -> object:
    with learner.model.frozen_in(learner.config.frozen_dtype):
        return learner.adapt(params, episode.support)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    try:
        answer = _trial(FewShotConfig.from_dict(task["config"]), task["shape"], task["episodes"], task["device"])
    except (ValueError, OSError) as error:
        answer = {"refused": str(error), "kind": "OSError" if isinstance(error, OSError) else "ValueError"}
    print(json.dumps(answer))
