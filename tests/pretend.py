"""An accelerator that is not there: tensors that say they are on one, refuse company from elsewhere as one would, and
are computed by the CPU, so that what runs on a GPU alone is tested where there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
#: Take tensors from both sides.
MOVES = {aten.copy_.default, aten._to_copy.default}
#: Take indices and single numbers from the CPU, which wait for the accelerator.
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
#: Cannot go on before what is to be computed is there.
LOOKS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default}
#: Touch no number, though torch does not call them views.
IDLE = {"aten::detach", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::_unsafe_view", "aten::alias"}


#: Devices in Python are new in torch, and none of its public names yet.
KNOWN = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


class _Module(getattr(backend_registration, "_DummyBackendModule", object)):  # type: ignore[misc]
    """What torch asks of ``torch.pretend``. Random numbers are those of the CPU."""

    there = False

    def is_available(self) -> bool:
        return self.there

    def device_count(self) -> int:
        return int(self.there)

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def device(self, device: Any) -> Any:
        return nullcontext()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@contextmanager
def _prepared() -> Iterator[None]:
    """What torch does otherwise where there is such a device."""
    swap, lift, asarray = torch.__future__, torch._C, torch.asarray
    before = swap.get_swap_module_params_on_conversion(), lift._only_lift_cpu_tensors()
    # ``param.data = ...`` cannot turn a parameter into one of another device's kind; this can, and keeps the object.
    swap.set_swap_module_params_on_conversion(True)
    lift._set_only_lift_cpu_tensors(True)
    # safetensors makes tensors of storages, which no mode can look through.
    torch.asarray = unseen(asarray)
    _Module.there = True
    try:
        yield
    finally:
        _Module.there = False
        torch.asarray = asarray
        lift._set_only_lift_cpu_tensors(before[1])
        swap.set_swap_module_params_on_conversion(before[0])


def unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, outside of all modes."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


class PretendTensor(Tensor):
    """``inner``, said to be on the accelerator."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        shape = torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype, device="meta")
        self = Tensor._make_subclass(cls, shape, False, dispatch_device=True, device_for_backend_keys=DEVICE)
        self.inner = inner
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return DEVICE

    # Where the numbers lie: what torch says of shapes alone would be the same for all.
    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"{self.inner!r} on {DEVICE}"


class Accelerator(TorchDispatchMode):
    """A block in which ``DEVICE`` can be named.

    Attributes:
        asked: how often each operation was asked for that computes or moves numbers, which on a GPU is a kernel.
        waits: how often the program looked at what is there, which on an accelerator waits for all that was asked for
            before; by operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        # Below autograd and vmap, where FakeTensorMode is.
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    def __enter__(self) -> Accelerator:
        if not KNOWN:
            pytest.skip("needs a torch that takes devices in Python")
        self._prepared = _prepared()
        self._prepared.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._prepared.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {}, self)


def _run(function: Any, args: Any, kwargs: dict[str, Any], seen: Accelerator | None = None) -> Any:
    if function is torch.ops.prim.device.default:
        return DEVICE
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    here = [each for each in tensors if isinstance(each, PretendTensor)]
    away = [each for each in tensors if not isinstance(each, PretendTensor) and each.dim()]
    named = kwargs.get("device")
    onto = bool(here) if named is None else torch.device(named).type == DEVICE.type
    indexed = function in INDEXING and isinstance(args[0], PretendTensor)
    if here and away and function not in MOVES and not indexed:
        raise RuntimeError(f"Expected all tensors to be on the same device, {function}: {[t.shape for t in away]}")
    in_place = torch.Tag.inplace_view in function.tags
    if seen is not None and here:
        masked = function in INDEXING and any(t is not None and t.dtype == torch.bool for t in args[1])
        brought = function in MOVES and isinstance(args[0], PretendTensor) is not onto
        seen.waits[str(function)] += bool(function in LOOKS or masked or brought or (indexed and away))
        seen.asked[str(function)] += not (function.is_view or in_place or function._schema.name in IDLE)
    plain_args, plain = tree_map(_inner, args), tree_map(_inner, kwargs)
    if onto and named is not None:
        plain["device"] = torch.device("cpu")
    out = IN_ONE.get(function, function)(*plain_args, **plain)
    known = {id(each.inner): each for each in here}
    if in_place:
        _shape_alone(function, args, kwargs)
    return tree_map(lambda t: known.get(id(t), PretendTensor(t)) if onto and type(t) is Tensor else t, out)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, PretendTensor) else value


def _shape_alone(function: Any, args: Any, kwargs: Any) -> None:
    """Have ``function`` change what the outside of its first argument says of its shape, too."""
    with torch._C._DisableTorchDispatch(), torch._C._PreserveDispatchKeyGuard():
        torch._C._set_meta_in_tls_dispatch_include(True)
        function(*args, **kwargs)


def _lstm_cell(of_input: Tensor, of_hidden: Tensor, cell: Tensor, *biases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What accelerators compute in one: a CPU has no such operation."""
    gates = sum((each for each in biases if each is not None), of_input + of_hidden)
    let_in, keep, new, out = (f(g) for f, g in zip(LSTM_GATES, gates.chunk(4, dim=1), strict=True))
    after = keep * cell + let_in * new
    return out * after.tanh(), after, torch.cat([let_in, keep, new, out], dim=1)


def _lstm_cell_backward(
    of_hidden: Tensor | None, of_cell: Tensor | None, cell: Tensor, after: Tensor, gates: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    let_in, keep, new, out = gates.chunk(4, dim=1)
    of_hidden = torch.zeros_like(cell) if of_hidden is None else of_hidden
    through = of_hidden * out * (1 - after.tanh() ** 2) + (0 if of_cell is None else of_cell)
    slopes = let_in * (1 - let_in), keep * (1 - keep), 1 - new**2, out * (1 - out)
    own = through * new, through * cell, through * let_in, of_hidden * after.tanh()
    grad = torch.cat([a * b for a, b in zip(own, slopes, strict=True)], dim=1)
    return grad, through * keep, grad.sum(0) if has_bias else None


LSTM_GATES = torch.sigmoid, torch.sigmoid, torch.tanh, torch.sigmoid
IN_ONE = {
    aten._thnn_fused_lstm_cell.default: _lstm_cell,
    aten._thnn_fused_lstm_cell_backward_impl.default: _lstm_cell_backward,
}


if KNOWN:
    backend_registration._setup_privateuseone_for_python_backend("pretend", backend_module=_Module())
DEVICE = torch.device("pretend" if KNOWN else "privateuseone", 0)
