"""What ends a command before its time, in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState

from fewshot_nlp.checks import printable
from fewshot_nlp.hub.info import without_tokens
from fewshot_nlp.training.faults import FAULTS, LostProcess
from fewshot_nlp.training.interrupts import leaving_at_once

Run = TypeVar("Run")
#: Longest message; what is quoted in it may be of any length.
LIMIT = 2000


def refusal(error: BaseException) -> SystemExit:
    """The end of the program with one message: no access token in it, and nothing that a terminal would obey."""
    return SystemExit(f"error: {printable(without_tokens(str(error)), kept=chr(10), limit=LIMIT)}")


def carry_out(prepare: Callable[[], Run], execute: Callable[[Run], object], again: str) -> None:
    """``execute(prepare())``.

    Args:
        again: what to do after a signal that left no results.

    Raises:
        SystemExit: with one line, where the input is bad, or for a fault that is not the code's.
        Interrupted: SIGTERM or SIGINT.
    """
    try:
        with leaving_at_once("left while the run was prepared; nothing was trained yet."):
            run = prepare()
    except (ValueError, OSError, ImportError, LostProcess) as error:
        # Bad input has one line to say; where in the code it was found does not help.
        raise refusal(error) from error
    try:
        with leaving_at_once(f"left without results. {again}"):
            execute(run)
    except FAULTS as error:
        # What every process finds is said once.
        shared = isinstance(error, FloatingPointError | LostProcess) and not PartialState().is_main_process
        raise (SystemExit(1) if shared else refusal(error)) from error
