"""The one place where Accelerate is set up: device, processes, precision, experiment trackers."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, LoggerType

from fewshot_nlp.training.arguments import FewShotTrainingArguments

#: Ways to spread one model over devices that Accelerate is told of by these variables, and why none of them can be.
SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP shards the parameters that a module holds",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed takes over the backward pass and the optimiser",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM takes over the model",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config shards the parameters that a module holds",
}


def build_accelerator(args: FewShotTrainingArguments) -> Accelerator:
    """An Accelerator for ``args``, with its trackers named but not yet started.

    Raises:
        ValueError: an unknown tracker; fp16: learners take gradients themselves, where no loss scaler reaches; FSDP,
            DeepSpeed and their like; a compiler; a launcher whose processes do not find one another; another precision
            than that of an earlier Accelerator of the process, which Accelerate cannot change.
        ImportError: a tracker whose package is not installed.
    """
    check_trackers(args.trackers)
    check_not_sharded()
    check_not_compiled()
    # Not left open: where the process has an Accelerator already, the precision of that one would hold unasked.
    precision = "bf16" if args.bf16 else os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    accelerator = Accelerator(
        # Without an accelerator, processes find one another only if they are told that there is none.
        cpu=args.use_cpu or not torch.accelerator.is_available(),
        mixed_precision=precision,
        log_with=args.trackers or None,
        project_dir=args.output_dir if args.trackers else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout))],
    )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != started:
        raise ValueError(
            f"The launcher started {started} processes (WORLD_SIZE), and Accelerate knows of "
            f"{accelerator.num_processes}: each would train alone. Start them with torchrun --nproc_per_node {started}."
        )
    alone = accelerator.num_processes == 1
    # For processes on a CPU `accelerate launch` says where they would meet, and starts one of them.
    if {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ and alone:
        warnings.warn(
            f"accelerate launch was told of several processes (MASTER_ADDR={os.environ['MASTER_ADDR']}), and without "
            f"GPUs starts this one alone: the result is the same, and takes longer. Start them with torchrun "
            f"--nproc_per_node N, or unset MASTER_ADDR.",
            stacklevel=2,
        )
    check_precision(accelerator, args)
    if accelerator.device.type == "cpu":
        # Launchers give each process one thread unless told otherwise, which leaves cores idle.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(args.cpu_threads or max(1, cores // local))
    return accelerator


def check_precision(accelerator: Accelerator, args: FewShotTrainingArguments) -> None:
    """Raise ``ValueError`` where ``accelerator`` computes in what no gradient survives, or otherwise than ``args``
    say."""
    found = accelerator.mixed_precision
    if found not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision={found!r} needs loss scaling, which does not reach meta-gradients. Use bf16, or no mixed "
            f"precision."
        )
    if args.bf16 and found != "bf16":
        raise ValueError(
            f"bf16 is set, and the accelerator that was given has mixed_precision={found!r}, which would hold. Make it "
            f"with mixed_precision='bf16', or leave one of the two out."
        )


def check_not_compiled() -> None:
    """Raise ``ValueError`` where the launcher asked for a compiler, which would change nothing."""
    backend = (os.environ.get("ACCELERATE_DYNAMO_BACKEND") or "no").lower()
    if backend != "no":
        raise ValueError(
            f"dynamo_backend={backend!r} would change nothing: Accelerate compiles models that it prepares, and "
            f"a learner calls its own with parameters from outside. Leave it out of accelerate config and launch."
        )


def check_not_sharded() -> None:
    """Raise ``ValueError`` where Accelerate was configured to spread one model over devices."""
    for variable, reason in SHARDED.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on"):
            raise ValueError(
                f"{variable} is set, but {reason}, and a learner calls its model with whole parameters from outside "
                f"and differentiates through them. Choose plain data parallelism in accelerate config; for a backbone "
                f"that is too large, train an adapter with frozen_dtype: bfloat16, a smaller graph_memory_gb, or LoRA "
                f"on the top layers."
            )


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
