"""Calls of C functions: made at once, or recorded and then made again and again without their Python.

A recording is what a CUDA graph is on a GPU: the same functions on the same addresses, in order, by as many threads as
there were. Whatever else torch would compute while it is taken could not be made again, so it refuses that.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vericache_compile.kernels import native

aten = torch.ops.aten
ALLOCATES = (aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default, aten.empty_strided.default)
MOST = 96
"""Arguments of a call, as in the C++ file."""

CALLING: dict[Any, Callable[..., Any]] = {}
"""Operators that may call C functions, and what they do."""

Argument = Tensor | ctypes.Structure | ctypes.Array[Any] | int | None
"""What a function is given: a whole number, or something whose address it is given."""


class NotRecordedError(RuntimeError):
    """Something was computed that a recording cannot make again."""


class Calls:
    """What was recorded within `with calls:`, by this thread; nothing of it has run then."""

    def __init__(self) -> None:
        self._parts: list[_Batch | Callable[[], None]] = []
        self._guard: TorchDispatchMode = _Guard()  # type: ignore[no-untyped-call]

    def add(self, function: int, arguments: Sequence[Argument], held: object = None) -> None:
        """Call the function at an address with these arguments, each 64 bits wide, when the recording is replayed."""
        if len(arguments) > MOST:
            raise NotRecordedError(f"a function of {len(arguments)} arguments")
        last = self._parts[-1] if self._parts else None
        if not isinstance(last, _Batch):
            last = _Batch()
            self._parts.append(last)
        last.add(function, arguments, held)

    def run(self, function: Callable[[], None]) -> None:
        """Run Python when the recording is replayed: for what a library computes that takes long enough."""
        self._parts.append(function)

    def __enter__(self) -> Calls:
        assert recording() is None, "recordings are taken one at a time"
        _taking.acquire()  # a dispatch mode sets flags that all threads share
        _thread.calls = self
        self._guard.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guard.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        _thread.calls = None
        _taking.release()

    def replay(self) -> None:
        """Make all calls in their order."""
        for part in self._parts:
            part()


class _Batch:
    """Calls of C functions with nothing else between."""

    def __init__(self) -> None:
        self._fields: list[int] = []
        """For each call `struct Call` of the C++ file."""
        self._laid_out: ctypes.Array[ctypes.c_int64] | None = None
        self._held: list[object] = []
        """What lies at the addresses that functions are given."""

    def add(self, function: int, arguments: Sequence[Argument], held: object) -> None:
        given = (ctypes.c_int64 * len(arguments))(*map(number_of, arguments))
        self._fields += (function, ctypes.addressof(given), len(given))
        self._held.append((given, arguments, held))

    def __call__(self) -> None:
        if self._laid_out is None:
            self._laid_out = (ctypes.c_int64 * len(self._fields))(*self._fields)
        message, library = ctypes.create_string_buffer(1024), native.load()
        assert library is not None, "recorded by the library"
        places = ctypes.addressof(self._laid_out), len(self._held), ctypes.addressof(message), len(message)
        if library.make_calls(*places) < len(self._held):
            raise RuntimeError(message.value.decode(errors="replace"))


class _Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets through what makes room or looks at it, and operators that call C functions."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CALLING:
            with self:
                return CALLING[func](*args, **(kwargs or {}))
        made = func(*args, **(kwargs or {}))
        if func not in ALLOCATES and not (func.is_view and _places(made) <= _places((args, kwargs))):
            raise NotRecordedError(f"{func} is torch's")
        return made

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Other threads may compile meanwhile."""
        return True


def _places(values: object) -> set[int]:
    """Where tensors keep their numbers: in inference mode what torch calls a view may be a copy."""
    return {x.untyped_storage().data_ptr() for x in tree_leaves(values) if isinstance(x, Tensor)}


_thread = threading.local()
_taking = threading.Lock()


def recording() -> Calls | None:
    """The recording that this thread takes, if any."""
    held: Calls | None = getattr(_thread, "calls", None)
    return held


def side_by_side(x: Tensor) -> Tensor:
    """x without gaps: itself, or a copy, which a recording could not make again."""
    if x.is_contiguous():
        return x
    if recording() is not None:
        raise NotRecordedError(f"a copy of numbers with strides {x.stride()} is torch's")
    return x.contiguous()


def number_of(argument: Argument) -> int:
    """A whole number as it is, anything else by its address, None by none."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, int):
        return argument
    return 0 if argument is None else ctypes.addressof(argument)


def call(function: Any, *arguments: Argument, held: object = None) -> None:
    """Call a function of the library of `native`, or record the call; `held` has what structures point to."""
    if (calls := recording()) is None:
        function(*map(number_of, arguments))
    else:
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None, "a function has an address"
        calls.add(address, arguments, held)
