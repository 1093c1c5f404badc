"""How much memory a graph holds, counted and not guessed, and what the whole process takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def graph_bytes(function: Callable[[], Any], own: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of ``function``, each storage counted once.

    Args:
        function: what is recorded; its result is kept until the count is over.
        own: tensors that are in memory anyway, such as the model's weights.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}
    # Storages are told apart by their address, so none may be freed and used again while they are counted.
    alive = []

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        result = function()
    del result
    return sum(kept.values())


def resident(device: str = "cpu") -> int:
    """Bytes in memory now: of this process, or of the tensors on the accelerator."""
    return _status("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()


def forget_peak(device: str = "cpu") -> None:
    """Let ``peak`` count from here, and not from what was done before."""
    if device == "cpu":
        # What the allocator kept for later would count as taken.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    else:
        torch.cuda.reset_peak_memory_stats()


def peak(device: str = "cpu") -> int:
    """The most bytes that were in memory at a time."""
    return _status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def _status(key: str) -> int:
    """A line of this process's status on Linux, in bytes."""
    path = Path("/proc/self/status")
    if not path.is_file():
        raise OSError("Memory without a GPU is read from /proc, which this system lacks. Use Linux.")
    return int(path.read_text(encoding="utf-8").split(f"{key}:")[1].split()[0]) * 1024
