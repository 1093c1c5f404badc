"""The one place where Accelerate is set up: device, processes, precision, experiment trackers."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from fewshot_nlp.training.arguments import FewShotTrainingArguments


def build_accelerator(args: FewShotTrainingArguments) -> Accelerator:
    """An Accelerator for ``args``, with its trackers named but not yet started.

    Raises:
        ValueError: an unknown tracker, or fp16: learners take gradients themselves, where no loss scaler reaches.
        ImportError: a tracker whose package is not installed.
    """
    check_trackers(args.trackers)
    accelerator = Accelerator(
        cpu=args.use_cpu,
        mixed_precision="bf16" if args.bf16 else None,
        log_with=args.trackers or None,
        project_dir=args.output_dir if args.trackers else None,
    )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision={accelerator.mixed_precision!r} needs loss scaling, which does not reach meta-gradients. "
            "Use bf16, or no mixed precision."
        )
    if accelerator.device.type == "cpu":
        # Launchers give each process one thread unless told otherwise, which leaves cores idle.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(args.cpu_threads or max(1, cores // local))
    return accelerator


def check_trackers(names: list[str]) -> None:
    """Accelerate drops a tracker that is not installed without a word; say so instead."""
    known = [kind.value for kind in LoggerType if kind is not LoggerType.ALL]
    available = [str(LoggerType(name).value) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ValueError(f"report_to={name!r} is not known. Use one of: none, {', '.join(known)}.")
        if name not in available:
            raise ImportError(f"report_to={name!r} needs a package that is not installed. Run `pip install {name}`.")


def start_trackers(accelerator: Accelerator, args: FewShotTrainingArguments) -> None:
    """Open a run in every tracker, with the settings but never the token."""
    if accelerator.log_with and not accelerator.trackers:
        name = args.run_name or Path(args.output_dir).name
        accelerator.init_trackers(name, config=args.to_sanitized_dict())
