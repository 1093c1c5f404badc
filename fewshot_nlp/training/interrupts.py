"""SIGTERM and SIGINT: the first one asks the run to save and leave, a second one kills it."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fewshot_nlp.training.resume import save

if TYPE_CHECKING:
    from fewshot_nlp.training.trainer import FewShotTrainer

SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Launchers pass on a signal that the terminal has sent to all processes already: what comes within this many seconds
#: is the same request.
ECHO = 1.0


class Interrupted(SystemExit):
    """A run that was told to leave, and has; the exit code is 128 plus the number of the signal, as shells have it."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


@contextmanager
def handled_by(handler: Callable[[int, object], None]) -> Iterator[None]:
    """A block in which ``handler`` is called with each of ``SIGNALS``; in the main thread alone, as Python has it."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in SIGNALS} if main else {}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Listener:
    """Keeps the first signal for the run to act on.

    Attributes:
        heard: number of the signal that came; 0 for none.
    """

    def __init__(self) -> None:
        self.heard = 0
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A block in which a first signal does no more than be heard; one that the block did not act on comes again."""
        self.heard = 0
        with handled_by(self._hear):
            yield
        if self.heard:
            signal.raise_signal(self.heard)

    def _hear(self, number: int, frame: object) -> None:
        if not self.heard:
            self.heard, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


@contextmanager
def leaving_at_once(words: str) -> Iterator[None]:
    """A block that has nothing to save: in it, SIGTERM and SIGINT print ``words`` and raise ``Interrupted``."""

    def obey(number: int, frame: object) -> None:
        print(f"\n{signal.Signals(number).name}: {words}", file=sys.stderr, flush=True)
        raise Interrupted(number)

    with handled_by(obey):
        yield


def leave_if_told(trainer: FewShotTrainer) -> None:
    """``leave``, on all ranks, where any of them has heard a signal since its last micro-round, in a validation say."""
    heard = torch.tensor([float(trainer.listener.heard)], device=trainer.accelerator.device)
    if trainer.accelerator.reduce(heard, reduction="sum").item():
        leave(trainer)


def leave(trainer: FewShotTrainer) -> None:
    """Save ``trainer`` as it was at the end of its last step, say how to go on, and raise ``Interrupted``.

    All ranks come here in the same step; of those that heard no signal, SIGTERM is taken.
    """
    args, number = trainer.args, trainer.listener.heard or signal.SIGTERM
    step = trainer.state.global_step
    words = f"\n{signal.Signals(number).name}: left after step {step} of {args.max_steps}. "
    if args.save_strategy == "no":
        words += "Nothing was saved, as save_strategy=no."
    else:
        save(trainer)
        words += (
            f"Saved {Path(args.output_dir) / f'checkpoint-{step}'}. Go on with the same command and "
            f"--resume_from_checkpoint true."
        )
    if trainer.accelerator.is_main_process:
        print(words, file=sys.stderr, flush=True)
    trainer.accelerator.end_training()
    raise Interrupted(number)
