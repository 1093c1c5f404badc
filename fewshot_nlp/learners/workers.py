"""Episodes side by side on the cores of a CPU.

The tensors of one episode are small: a second core on the same product gains half of what it gains on another episode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from fewshot_nlp.learners import BaseLearner

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Each worker holds a copy of the model.
MAX_WORKERS = 4


def workers_for(learner: Any) -> int:
    """How many workers ``learner`` gains from: one where its texts are kept from episode to episode, on an accelerator,
    and under autocast, which is known to the calling thread alone."""
    if not isinstance(learner, BaseLearner) or not learner.fast_body:
        return 1
    if learner.model.trunk is not None and learner.model.trunk.works:
        return 1
    if learner.model.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return 1
    return min(torch.get_num_threads(), MAX_WORKERS)


def side_by_side(
    work: Callable[[Any, Item], Result], learner: Any, items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """``work(learner, item)`` for each of ``items``, in their order, by threads that share the cores evenly.

    Each thread has a copy of ``learner``, as calling a module with other parameters writes to it for a while. Close the
    iterator if it is not used up: it has set the number of torch's threads.
    """
    if workers == 1:
        yield from (work(learner, item) for item in items)
        return
    copies: SimpleQueue[Any] = SimpleQueue()
    for each in (learner, *(copy.deepcopy(learner) for _ in range(workers - 1))):
        copies.put(each)

    def job(item: Item) -> Result:
        mine = copies.get()
        try:
            return work(mine, item)
        finally:
            copies.put(mine)

    before, rest = torch.get_num_threads(), iter(items)
    own = before // workers
    torch.set_num_threads(own)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(own,)) as pool:
            # A part at a time: what is read ahead stays in memory.
            while part := list(islice(rest, 8 * workers)):
                yield from pool.map(job, part)
    finally:
        torch.set_num_threads(before)
