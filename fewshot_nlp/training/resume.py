"""Saving a trainer and going on from what was saved, to the bit."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerState
from transformers.trainer_callback import ExportableState

from fewshot_nlp.checks import first_line
from fewshot_nlp.config import CONFIG_NAME, FewShotConfig
from fewshot_nlp.hub.files import STAGING
from fewshot_nlp.training.arguments import FewShotTrainingArguments
from fewshot_nlp.training.checkpoint import (
    PREFIX,
    PROGRESS,
    STATE,
    Checkpoint,
    DamagedCheckpoint,
    check_checkpoint,
    clear_leftovers,
    delete_checkpoint,
    find_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    read_checkpoint,
    step_of,
    write_checkpoint,
)
from fewshot_nlp.training.metrics_log import Report, start_reports
from fewshot_nlp.training.optimization import (
    load_optimizer_tensors,
    load_scheduler_state,
    optimizer_tensors,
    scheduler_state,
)
from fewshot_nlp.training.validation import digest

if TYPE_CHECKING:
    from fewshot_nlp.training.trainer import FewShotTrainer

T = TypeVar("T")
#: Settings that a resumed run shares with the run that it resumes: any other value would train on other episodes, or
#: be silently overruled by the saved optimiser.
FIXED = ("seed", "meta_batch_size", "gradient_accumulation_steps", "optim", "learning_rate", "lr_scheduler_type",
         "weight_interpolation")  # fmt: skip


def _naming_damage(read: Callable[[FewShotTrainer, Path], T]) -> Callable[[FewShotTrainer, Path], T]:
    """``read`` with a ``DamagedCheckpoint`` where what it reads is not of the form that ``save`` gives it."""

    @wraps(read)
    def named(trainer: FewShotTrainer, folder: Path) -> T:
        try:
            return read(trainer, folder)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(
                f"Checkpoint {folder} is damaged: {STATE} or {PROGRESS} does not hold what a run needs "
                f"({type(error).__name__}: {first_line(error)}). Resume from another."
            ) from error

    return named


def save(trainer: FewShotTrainer) -> None:
    """Write a checkpoint of ``trainer`` from the main process, and delete those beyond ``save_total_limit``."""
    args, state = trainer.args, trainer.state
    if trainer.accelerator.is_main_process:
        if state.best_global_step is not None:
            state.best_model_checkpoint = str(Path(args.output_dir) / f"{PREFIX}{state.best_global_step}")
        progress = {
            "scheduler": scheduler_state(trainer.scheduler),
            "meter": trainer.meter.state(),
            "skipped_steps": trainer.skipped_steps,
            "skipped_in_a_row": trainer.skipped_in_a_row,
            "callbacks": _callback_states(trainer.callback_handler.callbacks),
            # Of its own accord, before the last step; a run that was stopped from outside goes on.
            "stopped": trainer.control.should_training_stop and state.global_step < state.max_steps,
            "run": _run_of(trainer),
            "validation": trainer.validation,
        }
        tensors = optimizer_tensors(trainer.optimizer, trainer.params)
        checkpoint = Checkpoint(trainer.params, tensors, asdict(state), progress)
        written = write_checkpoint(args.output_dir, state.global_step, checkpoint)
        prune_checkpoints(args.output_dir, args.save_total_limit, state.best_model_checkpoint, written)
    trainer.accelerator.wait_for_everyone()


@_naming_damage
def restore(trainer: FewShotTrainer, folder: Path) -> None:
    """Make ``trainer`` what it was when the checkpoint in ``folder`` was written.

    Raises:
        ValueError: the checkpoint is damaged, of other parameters, or of a run with other settings.
    """
    checkpoint = _read_own(trainer, folder)
    with torch.no_grad():
        for name, param in trainer.params.items():
            param.copy_(checkpoint.params[name])
    load_optimizer_tensors(trainer.optimizer, trainer.params, checkpoint.optimizer)
    progress, own = checkpoint.progress, trainer.state
    load_scheduler_state(trainer.scheduler, progress["scheduler"])
    trainer.meter.load(progress["meter"])
    trainer.skipped_steps, trainer.skipped_in_a_row = progress["skipped_steps"], progress["skipped_in_a_row"]
    trainer.control.should_training_stop = progress.get("stopped", False)
    _restore_callbacks(trainer.callback_handler.callbacks, progress["callbacks"])
    trainer.state = TrainerState(**checkpoint.state)
    # These belong to the run that goes on, not to the one that stopped.
    for name in ("max_steps", "logging_steps", "eval_steps", "save_steps", "is_local_process_zero",
                 "is_world_process_zero"):  # fmt: skip
        setattr(trainer.state, name, getattr(own, name))
    if trainer.accelerator.is_main_process:
        _begin(trainer.args, trainer.state.log_history)
    _take_over_best(trainer, progress.get("validation", {}), folder)
    # After the best step, which alone would be what a run that is killed before its first save goes on from.
    if trainer.args.save_strategy != "no":
        _take_along(trainer, checkpoint, folder)


def check_resumable(trainer: FewShotTrainer, folder: Path) -> None:
    """Raise ``ValueError`` where ``restore`` would."""
    _read_own(trainer, folder)


def load_best(trainer: FewShotTrainer) -> int | None:
    """Give ``trainer`` the parameters of the best validation, if there is one that can be read.

    Returns:
        Their step; 0 is the untrained start.
    """
    trainer.accelerator.wait_for_everyone()
    best = trainer.state.best_global_step
    if best is None:
        return None
    try:
        found = read_checkpoint(Path(trainer.args.output_dir) / f"{PREFIX}{best}").params
    except (FileNotFoundError, DamagedCheckpoint) as error:
        _forget_best(trainer, f"{error} The parameters of the last step are used instead.")
        return None
    with torch.no_grad():
        for name, param in trainer.params.items():
            param.copy_(found[name])
    return best


def _take_over_best(trainer: FewShotTrainer, validation: Mapping[str, Any], folder: Path) -> None:
    """Keep the best step of the run that wrote ``folder`` where what comes can be compared with it, and where it is
    there to be loaded at the end."""
    best = trainer.state.best_global_step
    if best is None:
        return None
    changed = [name for name, value in trainer.validation.items() if validation.get(name, value) != value]
    if changed:
        return _forget_best(
            trainer,
            f"{folder} was validated with other {', '.join(changed)}: its best step, {best}, does not compare with "
            f"those to come, and is dropped. Resume with the settings of that run to keep it.",
        )
    if not trainer.args.load_best_model_at_end:
        return None
    # The path that the checkpoint records is of another time, or of a stranger's.
    found = next((each for each in list_checkpoints(folder.parent) if step_of(each) == best), None)
    try:
        if found is None:
            raise FileNotFoundError(f"There is no {PREFIX}{best} beside it.")
        _take_along(trainer, _read_own(trainer, found), found)
    except (FileNotFoundError, ValueError) as error:
        _forget_best(trainer, f"The best step of {folder}, {best}, cannot be loaded, and is dropped: {error}")


def _take_along(trainer: FewShotTrainer, checkpoint: Checkpoint, folder: Path) -> None:
    """Write ``checkpoint`` of ``folder`` into ``output_dir``, too, if that is another place."""
    output_dir = Path(trainer.args.output_dir)
    elsewhere = folder.parent.resolve() != output_dir.resolve()
    if elsewhere and trainer.accelerator.is_main_process:
        write_checkpoint(output_dir, checkpoint.state["global_step"], checkpoint)


def _forget_best(trainer: FewShotTrainer, why: str) -> None:
    warnings.warn(why, stacklevel=4)
    state = trainer.state
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def resume_folder(args: FewShotTrainingArguments, wanted: str | Path | bool | None) -> Path | None:
    """The checkpoint to go on from, if any; ``wanted`` overrides ``args.resume_from_checkpoint``."""
    if wanted is None:
        wanted = args.resume_from_checkpoint
    how = str(wanted).lower()
    if not wanted or how in ("false", "none"):
        return None
    if how not in ("true", "auto"):
        folder = Path(str(wanted))
        check_checkpoint(folder)
        return folder
    found = find_checkpoint(args.output_dir)
    if found is None and how == "true":
        # What lies there is not replaced unasked, with auto neither.
        leave = (
            "in another output_dir, or in this one with overwrite_output_dir: true"
            if _own_files(Path(args.output_dir))
            else "or set it to auto, which does so by itself"
        )
        raise ValueError(
            f"resume_from_checkpoint=true, and output_dir={args.output_dir!r} holds no sound checkpoint. Leave "
            f"resume_from_checkpoint out to start anew, {leave}."
        )
    return found


def check_output_dir(args: FewShotTrainingArguments, names: Iterable[str] = (), resumed: bool = False) -> None:
    """Raise ``ValueError`` where a run would mix its files with those of another run or model.

    Args:
        args: of the run.
        names: files that it will write beside its checkpoints.
        resumed: it goes on from a checkpoint.
    """
    folder = Path(args.output_dir)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"output_dir={args.output_dir!r} holds {path.name}, a link by which the run might write to "
                f"{path.resolve()}. Remove the link, or give another output_dir."
            )
    if (folder / "config.json").exists() and not (folder / CONFIG_NAME).exists():
        raise ValueError(
            f"output_dir={args.output_dir!r} holds another model (config.json), which an adapter beside it would "
            f"break. Give another output_dir."
        )
    found = _own_files(folder)
    same_names = [name for name in names if (folder / name).exists()]
    if (found or same_names) and not args.overwrite_output_dir and not resumed:
        held = f"another run ({found[-1]})" if found else f"files that the run would replace ({', '.join(same_names)})"
        # With auto it has been looked for, and not found.
        sound = str(args.resume_from_checkpoint).lower() != "auto" and find_checkpoint(folder) is not None
        go_on = " set resume_from_checkpoint: true to go on," if sound else ""
        raise ValueError(
            f"output_dir={args.output_dir!r} holds {held}{'' if sound else ' and no sound checkpoint'}. Give another "
            f"output_dir,{go_on} or, to replace it, give overwrite_output_dir: true beside that output_dir."
        )


def _own_files(folder: Path) -> list[str]:
    """What a run has left in ``folder``: checkpoints, sound or not, and its adapter."""
    return [path.name for path in list_checkpoints(folder)] + [CONFIG_NAME] * (folder / CONFIG_NAME).exists()


def clear_checkpoints(args: FewShotTrainingArguments, accelerator: Accelerator) -> None:
    """Make room for a new run: delete the checkpoints of another where ``args`` says so, else refuse."""
    check_output_dir(args)
    # No process may delete before all have looked.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for folder in list_checkpoints(args.output_dir):
            delete_checkpoint(folder)
        _begin(args)
    accelerator.wait_for_everyone()


def _begin(args: FewShotTrainingArguments, history: Sequence[Report] = ()) -> None:
    """Clear what a killed process left halfway, and begin the log of a run that has reported ``history``."""
    clear_leftovers(args.output_dir)
    for folder in Path(args.output_dir).glob(f"{STAGING}*"):
        shutil.rmtree(folder, ignore_errors=True)
    if args.save_strategy != "no":
        start_reports(args.output_dir, history)


@_naming_damage
def _read_own(trainer: FewShotTrainer, folder: Path) -> Checkpoint:
    checkpoint = read_checkpoint(folder)
    step, last = checkpoint.state["global_step"], trainer.args.max_steps
    if step > last:
        raise ValueError(
            f"{folder} is of step {step}, beyond max_steps={last}: nothing would be trained. Use a max_steps "
            f"above {step}, or leave resume_from_checkpoint out to start anew."
        )
    _check_same_run(checkpoint.progress["run"], _run_of(trainer), folder)
    _check_same_params(checkpoint.params, trainer.params, folder)
    return checkpoint


def _run_of(trainer: FewShotTrainer) -> dict[str, Any]:
    """What makes a run the same run: its method, its episodes, and what fixes the optimiser."""
    settings = {name: getattr(trainer.args, name) for name in FIXED}
    # A sampler of one's own may have neither settings nor pools: its first episodes must speak for the others.
    sampler = trainer.train_sampler
    first = [sampler[i] for i in range(trainer.args.meta_batch_size)]
    pools = getattr(sampler, "pools", {})
    settings["train_pools"] = {name: pool.fingerprint[:16] for name, pool in pools.items()}
    settings |= {f"train_sampler.{name}": value for name, value in getattr(sampler, "settings", {}).items()}
    reader: Any = trainer.reader
    if getattr(reader, "unlabelled", None) is not None:
        settings |= {"unlabelled": reader.unlabelled.fingerprint[:16], "n_unlabelled": reader.n_unlabelled}
    # Another learner, inner rule or head may have parameters of the same names and shapes.
    method = getattr(trainer.learner, "config", None)
    if isinstance(method, FewShotConfig):
        settings |= method.to_dict()
    return {**settings, "first_episodes": digest(first)}


def _check_same_run(saved: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> None:
    # A setting that has come since the checkpoint was written had its default.
    saved = {**FewShotConfig().to_dict(), "weight_interpolation": 1.0, **saved}
    for name, value in own.items():
        if saved.get(name) == value:
            continue
        if name == "first_episodes":
            raise ValueError(
                f"{folder} was trained on other episodes: another data set, split, way, shot or number of queries. "
                f"Resume with the settings of that run, or start anew in another output_dir."
            )
        raise ValueError(
            f"{folder} was trained with {name}={saved.get(name)!r}, and this run has {name}={value!r}. Resume with the "
            f"settings of that run, or start anew in another output_dir."
        )


def _check_same_params(saved: Mapping[str, Tensor], own: Mapping[str, Tensor], folder: Path) -> None:
    if saved.keys() != own.keys():
        names = sorted(saved.keys() ^ own.keys())
        raise ValueError(f"{folder} holds other parameters than the learner: {', '.join(names[:4])}. Use its settings.")
    for name, value in saved.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"{folder} holds {name} of shape {tuple(value.shape)}, and the learner's has "
                f"{tuple(own[name].shape)}. Use the settings it was trained with."
            )


def _callback_states(callbacks: Iterable[Any]) -> dict[str, list[Any]]:
    """States of the callbacks that have one, by class name, in order."""
    states: dict[str, list[Any]] = {}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            states.setdefault(type(callback).__name__, []).append(callback.state())
    return states


def _restore_callbacks(callbacks: list[Any], states: Mapping[str, list[Any]]) -> None:
    """Put the states back, in order; a callback that was not there before keeps its own."""
    left = {name: list(found) for name, found in states.items()}
    for i, callback in enumerate(callbacks):
        found = left.get(type(callback).__name__)
        if isinstance(callback, ExportableState) and found:
            callbacks[i] = type(callback).from_state(found.pop(0))
    unused = [name for name, found in left.items() if found]
    if unused:
        warnings.warn(f"The checkpoint holds the state of callbacks that this run has not: {unused}.", stacklevel=2)
