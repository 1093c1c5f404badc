"""Callbacks of our own, on transformers' ``TrainerCallback``."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback, EarlyStoppingCallback

from fewshot_nlp.config import TASKS
from fewshot_nlp.training.arguments import FewShotTrainingArguments


def callbacks_of(args: FewShotTrainingArguments) -> list[TrainerCallback]:
    """The callbacks that ``args`` asks for: when to log, validate and save, what to show, when to stop early."""
    own: list[TrainerCallback] = [DefaultFlowCallback()]
    own.append(LinePrinterCallback() if args.disable_tqdm else EpisodeProgressCallback())
    if args.early_stopping_patience is not None:
        own.append(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))
    return own


class EpisodeProgressCallback(TrainerCallback):
    """A progress bar over steps that shows query loss, query accuracy and episodes a second.

    Validation results are written above the bar as they come.
    """

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, unit="step")
            self.bar.set_description("Meta-training")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
            if "progress" in kwargs:
                self.bar.set_postfix(kwargs["progress"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.write(validation_line(state.global_step, kwargs["metrics"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class LinePrinterCallback(TrainerCallback):
    """One printed line for every log, for terminals and files where a progress bar is a nuisance."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in kwargs["logs"].items())
            print(f"step {state.global_step}/{state.max_steps}: {shown}", flush=True)


def validation_line(step: int, metrics: dict[str, float]) -> str:
    """``step 50: validation accuracy 0.912 (1-shot 0.880, 5-shot 0.944), loss 0.310``."""
    score = next(score for score in TASKS.values() if f"eval_{score}" in metrics)
    prefix, suffix = "eval_", f"_{score}"
    shots = [
        f"{name[len(prefix) : -len(suffix)]} {value:.3f}"
        for name, value in metrics.items()
        if name.startswith(prefix) and name.endswith(suffix) and name != f"eval_{score}"
    ]
    shown = f"step {step}: validation {score.replace('_', ' ')} {metrics[f'eval_{score}']:.3f}"
    if len(shots) > 1:
        shown += f" ({', '.join(shots)})"
    return f"{shown}, loss {metrics['eval_loss']:.3f}"
