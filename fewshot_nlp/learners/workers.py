"""Tasks side by side on the cores of a CPU, in threads.

The tensors of one task are small: a second core on the same product gains half of what it gains on another task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from fewshot_nlp.learners.base import BaseLearner

Worker = TypeVar("Worker")
Item = TypeVar("Item")
Result = TypeVar("Result")

#: Threads take turns in Python: with more of them, they wait for each other.
MAX_WORKERS = 4
#: Weights, embeddings aside, from which on it is arithmetic that takes the time, and not Python.
LEAST_WEIGHTS = 200_000


def workers_for(learner: BaseLearner, tasks: int = 0) -> int:
    """How many workers ``learner`` gains from, such that each has as many cores, and as many of the ``tasks``, if these
    are few.

    One where a task leaves the features as they are, which then are found once; on an accelerator; where dropout draws
    from the one generator of all threads; and under autocast, which is known to the calling thread alone.
    """
    model = learner.model
    if not learner.fast_body or model.device.type != "cpu" or model.training:
        return 1
    if torch.is_autocast_enabled("cpu") or weights(model.module) < LEAST_WEIGHTS:
        return 1
    shared = math.gcd(torch.get_num_threads(), tasks)
    return max(count for count in range(1, MAX_WORKERS + 1) if shared % count == 0)


def weights(module: nn.Module) -> int:
    """How many ``module`` has, embeddings aside."""
    parts = [part for part in module.modules() if not isinstance(part, nn.Embedding)]
    return sum(value.numel() for part in parts for value in part.parameters(recurse=False))


def side_by_side(
    work: Callable[[Worker, Item], Result], workers: Sequence[Worker], items: Iterable[Item]
) -> Generator[Result, None, None]:
    """``work(worker, item)`` for each of ``items``, in their order, by threads that share the cores evenly.

    Args:
        work: of one item; a worker has one at a time.
        workers: one or more. What calls a module with other parameters writes to it for a while, so that each worker
            needs a module of its own.
        items: read some at a time.

    Close the iterator if it is not used up: it has set the number of torch's threads.
    """
    if len(workers) == 1:
        yield from (work(workers[0], item) for item in items)
        return
    before, rest = torch.get_num_threads(), iter(items)
    own = before // len(workers)
    torch.set_num_threads(own)
    try:
        with ThreadPoolExecutor(len(workers) - 1, initializer=torch.set_num_threads, initargs=(own,)) as pool:
            # A part at a time: what is read ahead stays in memory.
            while part := list(islice(rest, 8 * len(workers))):
                todo, done = enumerate(part), dict[int, Result]()

                def turn(
                    worker: Worker, todo: Iterator[tuple[int, Item]] = todo, done: dict[int, Result] = done
                ) -> None:
                    try:
                        # Another thread may take the last one in between a look and a grasp.
                        while (taken := next(todo, None)) is not None:
                            done[taken[0]] = work(worker, taken[1])
                    except BaseException:
                        for _ in todo:
                            pass
                        raise

                others = [pool.submit(turn, worker) for worker in workers[1:]]
                turn(workers[0])
                for other in others:
                    other.result()
                yield from (done[place] for place in range(len(part)))
    finally:
        torch.set_num_threads(before)
