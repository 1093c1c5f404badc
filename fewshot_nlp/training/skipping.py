"""Steps whose loss or gradient is not a finite number: left out, counted, and traced to their episodes."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from fewshot_nlp.training.resume import save
from fewshot_nlp.training.rounds import own_indices, read_episodes

if TYPE_CHECKING:
    from fewshot_nlp.training.trainer import FewShotTrainer


def skip(trainer: FewShotTrainer, loss: float, norm: float) -> None:
    """Count the current step as skipped, and warn with the episodes it is to be blamed on."""
    trainer.skipped_steps += 1
    trainer.skipped_in_a_row += 1
    culprits = find_culprits(trainer)
    if not culprits:
        words = "each of its episodes alone is finite, and their sum is not"
    else:
        words = f"not finite by themselves: {', '.join(culprits)}. Replay one with train_sampler.at(address)"
    if trainer.accelerator.is_main_process:
        warnings.warn(
            f"Skipped step {trainer.state.global_step + 1}: loss {loss}, gradient norm {norm}; {words}.", stacklevel=2
        )


def stop_if_lost(trainer: FewShotTrainer) -> None:
    """Save and stop where too many steps in a row were skipped.

    Raises:
        FloatingPointError: ``args.max_skipped_steps`` in a row.
    """
    if trainer.skipped_in_a_row < trainer.args.max_skipped_steps:
        return
    saved = ""
    if trainer.args.save_strategy != "no":
        save(trainer)
        saved = f"Step {trainer.state.global_step} is saved. "
    raise FloatingPointError(
        f"{trainer.skipped_in_a_row} steps in a row had a loss or gradient that is not finite; the warnings name their "
        f"episodes. {saved}Start anew with a lower inner_learning_rate or learning_rate, in another output_dir or with "
        f"overwrite_output_dir: true; a run that is resumed keeps its own."
    )


def find_culprits(trainer: FewShotTrainer) -> list[str]:
    """Addresses of the episodes of the current step, on all ranks, that are not finite by themselves, and the inner
    step where that begins.

    The episodes are run again one by one. That changes nothing, as a learner is a pure function.
    """
    found = []
    params, learner = trainer.current_params(), trainer.learner
    for micro_round in range(trainer.args.gradient_accumulation_steps):
        for episode in read_episodes(trainer, own_indices(trainer, micro_round)):
            with trainer.accelerator.autocast():
                part = learner.meta_grad(params, [episode])
                if all(bool(torch.isfinite(value).all()) for value in (part.loss, *part.grads.values())):
                    continue
                first_divergence = getattr(learner, "first_divergence", None)
                step = first_divergence and first_divergence(params, episode.support)
            where = f" (its inner loop diverges at step {step})" if step else ""
            found.append((episode.spec.index, f"{episode.spec.address}{where}"))
    return [words for _, words in sorted(each for part in gather_object([found]) for each in part)]
