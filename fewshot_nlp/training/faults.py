"""Faults that are not the code's: what happened, in one line, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate import Accelerator

from fewshot_nlp.types import Episode, EpisodeSpec


class UnreadableEpisode(ValueError):
    """An episode whose examples cannot be read any more."""


class LostProcess(RuntimeError):
    """Another process of the run is gone, or did not answer in time."""


#: What ends a run without being a fault of the code.
FAULTS = (OSError, FloatingPointError, UnreadableEpisode, LostProcess)


def read_episode(reader: Callable[[EpisodeSpec], Episode], spec: EpisodeSpec) -> Episode:
    """``reader(spec)``.

    Raises:
        UnreadableEpisode: where the data went away, were cut short or damaged since the run began.
    """
    try:
        return reader(spec)
    except (OSError, ValueError) as error:
        raise UnreadableEpisode(
            f"The episode {spec.address} cannot be read: {error} Where its data changed since the run began, put them "
            f"back, then go on from the last checkpoint with resume_from_checkpoint: true."
        ) from error


@contextmanager
def together(accelerator: Accelerator, timeout: float) -> Iterator[None]:
    """A block in which processes wait for one another.

    Raises:
        LostProcess: in place of what the transport says where one of them has died or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if accelerator.num_processes == 1 or not any(word in text.lower() for word in _TRANSPORT):
            raise
        raise LostProcess(
            f"A process of the run is gone, or did not answer within ddp_timeout={timeout:g} seconds, as process "
            f"{accelerator.process_index} of {accelerator.num_processes} found: {_short(text)}. Its own message, if it "
            f"had one, tells why. Start all processes again with --resume_from_checkpoint true."
        ) from error


#: What gloo and NCCL say when a peer is gone or late.
_TRANSPORT = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "timeout", "broken pipe")


def _short(text: str) -> str:
    """The first sentence of an error, without the place in the transport's code that it begins with."""
    return re.sub(r"^\[[^]]*\] ", "", text.splitlines()[0]).split(". ")[0]
