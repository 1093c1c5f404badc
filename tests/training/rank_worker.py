"""Run by ``test_ranks``: train every case on one, two and four gloo ranks; the first rank saves.

python tests/training/rank_worker.py OUT BERT 1 2 4

The ranks are forked from one process that has done the imports, and told of each other as torchrun tells them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from fewshot_nlp.config import LEARNERS
from fewshot_nlp.learners import build_learner
from fewshot_nlp.training import FewShotTrainer
from fewshot_nlp.training.faults import LostProcess
from tests.tiny import random_episode, tiny_config
from tests.training.toy import ToyLearner, ToySampler, toy_args, toy_reader


class Case(NamedTuple):
    """What is trained: ``size`` episodes in each of ``rounds`` micro-rounds a step; the toy learner if not named."""

    size: int
    rounds: int = 1
    adapter: str = "lora"
    learner: str | None = None
    steps: int = 10
    optim: str = "adamw_torch"
    dtype: torch.dtype = torch.float32


#: Even, odd, and fewer episodes than ranks; the three kinds of learners, to float64's last digits; then every learner,
#: whose rounding errors Adam would blow up where a gradient is next to nothing.
CASES = {
    "toy-4": Case(4),
    "toy-3": Case(3),
    "toy-1": Case(1, rounds=2),
    "lora-maml-3": Case(3, learner="maml"),
    "prompt-maml-1": Case(1, rounds=2, adapter="prompt_tuning", learner="maml"),
    **{
        f"float64: {name}, {size} x {rounds}": Case(
            size, rounds, learner=name, steps=4, optim="sgd", dtype=torch.float64
        )
        for name in ("maml", "reptile", "protonet")
        for size, rounds in ((4, 1), (5, 2))
    },
    **{f"every learner: {name}": Case(3, learner=name, steps=2, optim="sgd") for name in LEARNERS},
}
#: Sizes on which every learner runs; the others have the cases before.
EVERY_LEARNER = (1, 2)
#: The step after which something happens to the last rank.
STOPPED_AT = 5


def tiny_reader(spec):
    # A memory hides from a task what it knows of its own classes, so that each task has others.
    classes = tuple(f"class {spec.index} {c}" for c in range(spec.n_way))
    return replace(random_episode([2, 1, 3], seed=spec.index), spec=replace(spec, classes=classes))


def build(folder: Path, bert: str, case: Case, callbacks: Any = (), **settings: Any) -> FewShotTrainer:
    """A trainer whose start is of random numbers, unlike on each rank: the first one's counts."""
    seed = int(os.environ.get("RANK", 0))
    torch.manual_seed(seed)
    args = toy_args(
        folder, max_steps=case.steps, meta_batch_size=case.size, gradient_accumulation_steps=case.rounds,
        learning_rate=0.01, optim=case.optim, **settings,
    )  # fmt: skip
    if case.learner is None:
        learner: Any = ToyLearner()
    else:
        options = {"adapter": case.adapter, "learner": case.learner, "inner_learning_rate": 0.1}
        learner = build_learner(tiny_config(bert, num_virtual_tokens=3, **options), seed=seed)
        learner.model.module.to(case.dtype)
    reader = toy_reader if case.learner is None else tiny_reader
    evals = {"1-shot": ToySampler("validation")} if args.eval_strategy != "no" else None
    return FewShotTrainer(learner, args, ToySampler(), reader, evals, callbacks)


def cases_of(world_size: int) -> dict[str, Case]:
    """What is trained on so many ranks."""
    return {n: case for n, case in CASES.items() if world_size in EVERY_LEARNER or not n.startswith("every learner")}


def train_all(out: Path, bert: str, world_size: int) -> None:
    metrics = {}
    for name, case in cases_of(world_size).items():
        trainer = build(
            out / name, bert, case, eval_strategy="steps", eval_steps=case.steps // 2, eval_episodes=3,
            save_strategy="steps", save_steps=case.steps // 2, load_best_model_at_end=True,
        )  # fmt: skip
        accelerator = trainer.accelerator
        assert accelerator.num_processes == world_size, f"{accelerator.num_processes} processes, not {world_size}"
        assert accelerator.state.use_distributed == (world_size > 1)
        start = {f"start.{key}": value.detach().clone() for key, value in trainer.params.items()}
        trainer.train()
        if accelerator.is_main_process:
            save_file({**start, **trainer.detached_params()}, out / f"{name}.safetensors")
            evals = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
            metrics[name] = [{k: v for k, v in entry.items() if k != "episodes_per_second"} for entry in evals]
            (out / "metrics.json").write_text(json.dumps(metrics))
        accelerator.wait_for_everyone()
    accelerator.end_training()


class Die(TrainerCallback):
    """The last rank is told to leave, is killed or comes to a halt once a step has ended."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == STOPPED_AT and os.environ.get("RANK") == str(int(os.environ["WORLD_SIZE"]) - 1):
            os.kill(os.getpid(), self.number)


def train_until(out: Path, bert: str, world_size: int, number: int) -> None:
    """Ends as its last rank is told to; what the others say is in ``<rank>.txt``."""
    case, began = CASES["lora-maml-3"], time.monotonic()
    said = out / f"{os.environ['RANK']}.txt"
    try:
        build(out / "run", bert, case, [Die(number)], save_strategy="steps", save_steps=2, ddp_timeout=20).train()
    except LostProcess as error:
        said.write_text(f"{time.monotonic() - began:.1f} {error}")
        # As a launcher ends the others once one has failed.
        os._exit(1)


def train_on(out: Path, bert: str, world_size: int, folder: str) -> None:
    """Goes on from the checkpoint of another number of ranks."""
    # Where there is no accelerator, ranks find one another without being told so (use_cpu), too.
    told = {"use_cpu": torch.accelerator.is_available(), "save_strategy": "steps", "save_steps": 2}
    trainer = build(out / "run", bert, CASES["lora-maml-3"], **told)
    assert trainer.accelerator.num_processes == world_size
    trainer.train(resume_from_checkpoint=folder)
    if trainer.accelerator.is_main_process:
        save_file(trainer.detached_params(), out / "end.safetensors")
    trainer.accelerator.end_training()


def launch(world_size: int, job: Callable[..., None], out: Path, *arguments: Any) -> list[int]:
    """Exit codes of ``job(out, bert, world_size, ...)`` on each of ``world_size`` ranks; negative: a signal."""
    out.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            if world_size > 1:
                os.environ |= {name: str(value) for name, value in told.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = 1
            try:
                job(out, arguments[0], world_size, *arguments[1:])
                code = 0
            except SystemExit as error:
                code = error.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        ranks.append(pid)
    codes: dict[int, int] = {}
    halted: set[int] = set()
    while len(codes) < world_size:
        pid, status = os.waitpid(-1, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            halted.add(pid)
        else:
            codes[pid] = os.waitstatus_to_exitcode(status)
        if halted and len(codes) == world_size - 1:
            # One that came to a halt is ended by its launcher.
            os.kill(halted.pop(), signal.SIGKILL)
    return [codes[pid] for pid in ranks]


def main(out: Path, bert: str, sizes: list[int]) -> None:
    codes: dict[str, list[int]] = {}
    for size in sizes:
        codes[f"train on {size}"] = launch(size, train_all, out / str(size), bert)
    for name, number in {"told": signal.SIGTERM, "killed": signal.SIGKILL, "halted": signal.SIGSTOP}.items():
        codes[name] = launch(3, train_until, out / name, bert, number)
    folder = str(out / "told" / "run" / f"checkpoint-{STOPPED_AT}")
    for size in sizes:
        codes[f"go on on {size}"] = launch(size, train_on, out / f"on-{size}", bert, folder)
    (out / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [int(size) for size in sys.argv[3:]])
