"""The outer loop: episodes in, one meta-gradient out, one optimiser step; on any number of processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from fewshot_nlp.evaluation import EvaluationResult, evaluate, merge
from fewshot_nlp.training.accelerator import build_accelerator, check_precision, start_trackers
from fewshot_nlp.training.arguments import FewShotTrainingArguments
from fewshot_nlp.training.callbacks import callbacks_of
from fewshot_nlp.training.faults import read_episode, together
from fewshot_nlp.training.interrupts import Listener, leave_if_told
from fewshot_nlp.training.meter import Meter
from fewshot_nlp.training.metrics_log import append_report
from fewshot_nlp.training.optimization import build_optimizer, build_scheduler
from fewshot_nlp.training.resume import clear_checkpoints, load_best, restore, resume_folder, save
from fewshot_nlp.training.rounds import read_episodes, summed_over_ranks
from fewshot_nlp.training.skipping import skip, stop_if_lost
from fewshot_nlp.training.validation import (
    check_label_names,
    check_samplers,
    check_target,
    check_unlabelled,
    check_validation,
    is_better,
    kind_of_validation,
    metric_key,
    score_of,
    validation_metrics,
)
from fewshot_nlp.types import Episode, EpisodeSpec, Learner, MetaGrad, Params, check_learner


class Sampler(Protocol):
    """Episodes by index: an ``EpisodeSampler`` or an ``EpisodeMixture``."""

    def __getitem__(self, index: int) -> EpisodeSpec: ...


class TrainOutput(NamedTuple):
    """What ``train`` answers, as transformers' trainer does."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class FewShotTrainer:
    """Meta-trains a learner.

    Step ``s`` uses the episodes ``[s * n, (s + 1) * n)`` of ``train_sampler``, ``n = args.episodes_per_step``; of each
    micro-round, task ``i`` goes to rank ``i mod world size``. Every rank asks the learner for summed gradients; the
    sums are added up over ranks and divided by ``n``: the number of processes changes the speed and not the result.

    Args:
        learner: what is trained.
        args: how.
        train_sampler: training episodes by index, endless or enough for all of ``args.max_steps``.
        reader: turns an ``EpisodeSpec`` into an ``Episode``.
        eval_samplers: validation episodes by name, such as ``{"1-shot": ..., "5-shot": ...}``; the first
            ``args.eval_episodes`` of each are used every time.
        callbacks: transformers' callbacks, beside those that ``args`` asks for.
        accelerator: one that exists already; built from ``args`` if not given.
        params: where training starts; ``learner.init_params()`` if not given.

    Attributes:
        params: the meta-parameters by name, as they are now.
        state, control: transformers' ``TrainerState`` and ``TrainerControl``.
        validation: what, beside the method, makes its validations comparable with those of another run.
        skipped_steps: steps left out because their loss or gradient was not finite.

    Raises:
        ValueError: settings that do not fit the samplers, or the accelerator that was given.
        ImportError: a tracker in ``args.report_to`` that is not installed.
        TypeError: something else than a learner.
    """

    def __init__(
        self,
        learner: Learner,
        args: FewShotTrainingArguments,
        train_sampler: Sampler,
        reader: Callable[[EpisodeSpec], Episode],
        eval_samplers: Mapping[str, Sampler] | None = None,
        callbacks: Iterable[TrainerCallback | type[TrainerCallback]] = (),
        accelerator: Accelerator | None = None,
        params: Params | None = None,
    ) -> None:
        check_learner(learner)
        if not isinstance(args, FewShotTrainingArguments):
            raise ValueError(
                f"args of type {type(args).__name__} must be FewShotTrainingArguments, which has transformers' names "
                f"for the settings that are read here."
            )
        samplers = {} if eval_samplers is None else eval_samplers
        check_samplers(train_sampler, samplers, args)
        self.learner, self.args, self.train_sampler, self.reader = learner, args, train_sampler, reader
        self.accelerator = accelerator or build_accelerator(args)
        check_precision(self.accelerator, args)
        self.listener = Listener()
        self.eval_specs = {name: [sampler[i] for i in range(args.eval_episodes)] for name, sampler in samplers.items()}
        self.validation = kind_of_validation(args, self.eval_specs, samplers.values())
        self.score = score_of(learner)
        check_validation(args, self.eval_specs, self.score)
        check_label_names(learner, reader)
        check_unlabelled(learner, reader)
        check_target(learner, [train_sampler])
        model = getattr(learner, "model", None)
        if model is not None:
            model.to(self.accelerator.device)
        # Every process starts where the first one does, however it was seeded.
        given = learner.init_params() if params is None else params
        start = {name: value.detach().clone().to(self.accelerator.device) for name, value in given.items()}
        if not start:
            raise ValueError("The learner has no parameters to train. Evaluate it as it is.")
        self.params = {name: nn.Parameter(value) for name, value in broadcast(start).items()}
        # What is kept may lie between the start and what was trained.
        self._start = {n: v.detach().clone() for n, v in self.params.items()} if args.weight_interpolation < 1 else {}
        # What the learner's own ``remember`` writes, and the optimiser does not.
        self._remembered: frozenset[str] = getattr(learner, "remembered", frozenset())
        self.optimizer = build_optimizer(self.params, args)
        self.scheduler = build_scheduler(self.optimizer, args)
        self.meter = Meter()
        self.skipped_steps = self.skipped_in_a_row = 0
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=args.max_steps,
            logging_steps=args.logging_steps,
            eval_steps=args.eval_steps,
            save_steps=args.save_steps,
            num_train_epochs=1,
            is_local_process_zero=self.accelerator.is_local_main_process,
            is_world_process_zero=self.accelerator.is_main_process,
        )
        self.callback_handler = CallbackHandler(
            [*callbacks_of(args), *callbacks],
            getattr(model, "module", None),
            getattr(model, "tokenizer", None),
            self.optimizer,
            self.scheduler,
        )
        self._notify("on_init_end")

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> TrainOutput:
        """Run to ``args.max_steps``, from the start or from a checkpoint; a resumed run ends as an unbroken one does.

        Args:
            resume_from_checkpoint: a checkpoint folder; ``True`` for the newest sound one in ``args.output_dir``;
                ``"auto"`` for that or, without one, the start; by default what ``args`` says.

        Raises:
            ValueError: no or a damaged checkpoint; one of another run; an ``output_dir`` that holds another run.
            FileNotFoundError: a checkpoint folder that does not exist.
            FloatingPointError: ``args.max_skipped_steps`` steps in a row without a finite gradient; the last one is
                saved.
            OSError: a disk that is full or cannot be written.
            UnreadableEpisode: data that went away in mid-run.
            LostProcess: another process of the run that died, or did not answer in time.
            Interrupted: SIGTERM or SIGINT, once the last step is saved; a second one ends the process at once.
        """
        with self.listener.listening(), together(self.accelerator, self.args.ddp_timeout):
            return self._train(resume_folder(self.args, resume_from_checkpoint))

    def _train(self, folder: Path | None) -> TrainOutput:
        if folder is not None:
            restore(self, folder)
        else:
            clear_checkpoints(self.args, self.accelerator)
        start_trackers(self.accelerator, self.args)
        started, first_step = time.perf_counter(), self.state.global_step
        stopped = self.control.should_training_stop  # before, by itself: a callback clears it when training begins
        self._notify("on_train_begin")
        self._notify("on_epoch_begin")
        self.control.should_training_stop |= stopped
        if self.args.eval_on_start and folder is None and first_step == 0 and self.eval_specs:
            self._validate()
            self._save()
        while self.state.global_step < self.args.max_steps and not self.control.should_training_stop:
            self._train_step()
        leave_if_told(self)
        self._notify("on_epoch_end")
        loaded = load_best(self) if self.args.load_best_model_at_end else None
        seconds = time.perf_counter() - started
        episodes = (self.state.global_step - first_step) * self.args.episodes_per_step
        metrics = {
            "train_loss": self.meter.mean_loss,
            "train_runtime": seconds,
            "train_episodes_per_second": episodes / seconds,
            "train_skipped_steps": float(self.skipped_steps),
        }
        self._notify("on_train_end")
        if loaded == 0 and self.accelerator.is_main_process:
            print("The untrained start was the best on validation: its parameters were loaded.", flush=True)
        return TrainOutput(self.state.global_step, self.meter.mean_loss, metrics)

    def evaluate(self) -> dict[str, float]:
        """Validate: ``eval_accuracy`` (of regressions ``eval_negative_mse``) and ``eval_loss`` are means over the
        ``eval_<name>_...`` of each eval sampler."""
        results = {name: self.evaluate_on(specs) for name, specs in self.eval_specs.items()}
        metrics = validation_metrics(results)
        self.log(metrics)
        self._notify("on_evaluate", metrics=metrics)
        return metrics

    def evaluate_on(
        self,
        specs: Sequence[EpisodeSpec],
        learner: Learner | None = None,
        params: Params | None = None,
        progress: bool = False,
    ) -> EvaluationResult:
        """Evaluate a learner, by default the trained one; each rank takes a share of ``specs``, all get the whole."""
        accelerator = self.accelerator
        if learner is None:
            learner, params = self.learner, self.detached_params()
        with accelerator.autocast(), together(accelerator, self.args.ddp_timeout):
            part = evaluate(
                learner,
                params or {},
                specs,
                partial(read_episode, self.reader),
                device=accelerator.device,
                progress=progress and accelerator.is_main_process,
                shard=(accelerator.process_index, accelerator.num_processes),
            )
            return merge(gather_object([part]))

    def current_params(self) -> dict[str, Tensor]:
        """The meta-parameters that are trained, as they are now, outside of any graph."""
        return {name: param.detach() for name, param in self.params.items()}

    @torch.no_grad()
    def detached_params(self) -> dict[str, Tensor]:
        """What is validated, tested and kept: ``θ0 + α (θ - θ0)`` of the start ``θ0`` and the current meta-parameters
        ``θ``, with ``α = args.weight_interpolation`` (WiSE-FT, Wortsman et al., CVPR 2022, arXiv:2109.01903)."""
        share, now = self.args.weight_interpolation, self.current_params()
        # What a learner remembers is data, and has no place in between.
        between = {name: start.lerp(now[name], share) for name, start in self._start.items()}
        return {**now, **{name: value for name, value in between.items() if name not in self._remembered}}

    def log(self, logs: dict[str, float]) -> None:
        """Record ``logs`` at this step: on the disk, in ``state.log_history``, with callbacks and trackers."""
        report = {**logs, "step": self.state.global_step}
        if self.accelerator.is_main_process and self.args.save_strategy != "no":
            append_report(self.args.output_dir, report)
        self.state.log_history.append(report)
        self._notify("on_log", logs=dict(logs))
        if self.accelerator.trackers:
            grouped = {
                f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
                for name, value in logs.items()
            }
            self.accelerator.log(grouped, step=self.state.global_step)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add one of transformers' callbacks, an object or a class."""
        self.callback_handler.add_callback(callback)

    def step_indices(self, step: int, micro_round: int) -> range:
        """Indices of the episodes of a micro-round, over all ranks."""
        size = self.args.meta_batch_size
        start = (step * self.args.gradient_accumulation_steps + micro_round) * size
        return range(start, start + size)

    def _train_step(self) -> None:
        self._notify("on_step_begin")
        started = time.perf_counter()
        total = summed_over_ranks(self, 0)
        for micro_round in range(1, self.args.gradient_accumulation_steps):
            self._notify("on_substep_end")
            total = total + summed_over_ranks(self, micro_round)
        loss, accuracy = float(total.loss) / total.episodes, float(total.accuracy) / total.episodes
        norm = self._optimizer_step(total)
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_in_a_row = 0
            self.meter.update(loss, accuracy, norm, total.episodes, time.perf_counter() - started)
        else:
            skip(self, loss, norm)
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / self.args.max_steps
        self._notify("on_step_end", progress=self.meter.shown(self.score))
        self._log_evaluate_save()
        stop_if_lost(self)

    def _optimizer_step(self, total: MetaGrad) -> float:
        """Mean, clip, step; the norm before clipping. With a loss or gradient that is not finite nothing changes."""
        for name, param in self.params.items():
            # Without a gradient the optimiser passes a parameter by, its weight decay too.
            if name not in self._remembered:
                param.grad = (total.grads[name] / total.episodes).to(param.dtype)
        grads = [param.grad for param in self.params.values() if param.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if torch.isfinite(norm) and torch.isfinite(total.loss):
            if self.args.max_grad_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(self.params.values(), self.args.max_grad_norm, norm)
            self._notify("on_pre_optimizer_step")
            self.optimizer.step()
            self._notify("on_optimizer_step")
            self.scheduler.step()
            self._remember()
        self.optimizer.zero_grad()
        return float(norm)

    @torch.no_grad()
    def _remember(self) -> None:
        """Let a learner with a memory write down the tasks of this step.

        Every rank goes through all of them, in the order of their indices, so that the memory does not depend on how
        they were dealt; the first rank's rounding counts.
        """
        if not self._remembered:
            return
        step, rounds = self.state.global_step, range(self.args.gradient_accumulation_steps)
        episodes = read_episodes(self, (i for r in rounds for i in self.step_indices(step, r)))
        learner: Any = self.learner
        with self.accelerator.autocast():
            found = learner.remember(self.current_params(), episodes)
        for name, value in broadcast(found).items():
            self.params[name].copy_(value)

    def _log_evaluate_save(self) -> None:
        if self.control.should_log and self.meter.steps:
            self.log({**self.meter.flush(self.score), "learning_rate": float(self.scheduler.get_last_lr()[0])})
        if self.control.should_evaluate and self.eval_specs:
            self._validate()
        self._save()

    def _validate(self) -> None:
        """Evaluate, and ask for a checkpoint of a new best."""
        value = self.evaluate()[metric_key(self.args.metric_for_best_model)]
        if is_better(self.args, value, self.state.best_metric):
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
            # The best must be on the disk if it is to be loaded at the end, whatever save_steps says.
            if self.args.load_best_model_at_end or self.args.save_strategy == "best":
                self.control.should_save = True

    def _save(self) -> None:
        """Write a checkpoint if one was asked for."""
        if self.control.should_save:
            save(self)
            self._notify("on_save")

    def _notify(self, event: str, **extra: Any) -> None:
        self.control = getattr(self.callback_handler, event)(self.args, self.state, self.control, **extra)
