"""A bounded memory of tensors: the latest used in memory, the others in a temporary file."""

from __future__ import annotations

import tempfile
import weakref
from collections import OrderedDict
from io import FileIO
from threading import RLock

import torch
from torch import Tensor

MAX_BYTES, MAX_FILE_BYTES = 512 * 2**20, 4 * 2**30


class TensorStore:
    """Tensors by address, for any number of threads. A copy starts empty.

    Args:
        max_bytes: kept in memory; beyond it, what was used longest ago goes to the file.
        max_file_bytes: kept in the file, which has no name and goes with the process; beyond it, tensors are forgotten.
            Tensors of an accelerator are forgotten at once.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.max_bytes, self.max_file_bytes = max_bytes, max_file_bytes
        self.bytes = self.file_bytes = 0
        self._near: OrderedDict[bytes, Tensor] = OrderedDict()
        self._far: dict[bytes, tuple[int, torch.dtype, torch.Size]] = {}
        self._file: FileIO | None = None
        self._lock = RLock()

    def __reduce__(self) -> tuple[type[TensorStore], tuple[int, int]]:
        return TensorStore, (self.max_bytes, self.max_file_bytes)

    def get(self, address: bytes) -> Tensor | None:
        """The tensor, or ``None`` if it is not known."""
        with self._lock:
            if address in self._near:
                self._near.move_to_end(address)
                return self._near[address]
            if address not in self._far:
                return None
            assert self._file is not None
            start, dtype, shape = self._far[address]
            self._file.seek(start)
            content = bytearray(self._file.read(shape.numel() * dtype.itemsize))
            tensor = torch.frombuffer(content, dtype=dtype).view(shape)
            self._keep(address, tensor)
            return tensor

    def put(self, address: bytes, tensor: object) -> None:
        """Keep a tensor; anything else is not kept."""
        if torch.is_tensor(tensor):
            with self._lock:
                self._keep(address, tensor)

    def _keep(self, address: bytes, tensor: Tensor) -> None:
        if address in self._near:
            self.bytes -= self._near[address].nbytes
        self._near[address] = tensor
        self.bytes += tensor.nbytes
        while self.bytes > self.max_bytes and len(self._near) > 1:
            old, value = self._near.popitem(last=False)
            self.bytes -= value.nbytes
            self._write(old, value)

    def _write(self, address: bytes, tensor: Tensor) -> None:
        if address in self._far or tensor.device.type != "cpu" or self.file_bytes + tensor.nbytes > self.max_file_bytes:
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115, as it lives as long as the store
            weakref.finalize(self, self._file.close)
        self._file.seek(self.file_bytes)
        # Numpy knows no bfloat16, but every tensor is bytes.
        content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        try:
            whole = self._file.write(content) == len(content)
        except OSError:
            whole = False
        if not whole:
            # The disk is full. What is not kept is computed again.
            self.max_file_bytes = self.file_bytes
            return
        self._far[address] = (self.file_bytes, tensor.dtype, tensor.shape)
        self.file_bytes += tensor.nbytes
