"""Recordings on the CPU: the C functions that a launch calls, ours and those that Inductor compiled.

Of a segment that Inductor compiled, the Python that it wrote is run with other functions in the place of its kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any, TypeVar

from torch import Tensor

from vericache_compile.kernels.calls import Calls, NotRecordedError, recording
from vericache_compile.plan import Act, Compiled, SegmentedProgram

HARMLESS = frozenset({"torch", "empty_strided_cpu", "reinterpret_tensor", "assert_size_stride", "assert_alignment"})
"""What else Inductor's functions use: what torch computes for them, a recording notices itself."""
Made = TypeVar("Made")


def record_calls(launch: Callable[[], Made]) -> tuple[Calls, Made]:
    """The C functions that `launch` calls, and what it returned; nothing of them has run."""
    with Calls() as calls:
        made = launch()
    return calls, made


def recordable(program: SegmentedProgram) -> SegmentedProgram:
    """The program with segments whose kernels are recorded while a recording is taken, and called otherwise."""
    steps = tuple(replace(step, run=_Segment(step.run)) if step.run is not None else step for step in program.steps)
    return replace(program, steps=steps)


class _Segment:
    """A compiled segment; while a recording is taken its Python runs with what records kernels in their place."""

    def __init__(self, run: Compiled) -> None:
        self._run = run

    def __call__(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        if recording() is None:
            return self._run(inputs)
        made: Sequence[Tensor] = _with_kernels_recorded(self._run)(inputs)
        return made


def is_inductors(program: SegmentedProgram) -> bool:
    """Whether Inductor compiled all segments."""
    return all(hasattr(step.run, "current_callable") for step in program.steps if step.act is Act.RUN)


def _with_kernels_recorded(run: Compiled) -> Callable[[list[Tensor]], Any]:
    """The function that Inductor wrote for a segment, over a copy of its module's names; raises NotRecordedError where
    it may call what would run unseen."""
    held: Any = getattr(run, "current_callable", None)
    function = getattr(held, "__func__", held)
    if not isinstance(function, FunctionType):
        raise NotRecordedError("a segment is not Inductor's")
    names = dict(function.__globals__)
    for name in set(function.__code__.co_names) & set(names):
        if (library := _library_of(names[name])) is not None:
            names[name] = partial(_record_kernel, _address_of(library))
        elif name not in HARMLESS and not isinstance(names[name], Tensor):
            raise NotRecordedError(f"a segment calls {name}")
    code = function.__code__
    if "partitions" in code.co_names or code.co_freevars or any(isinstance(each, CodeType) for each in code.co_consts):
        raise NotRecordedError("a segment is in parts")
    copy = FunctionType(code, names, function.__name__, function.__defaults__)
    return copy if held is function else MethodType(copy, held.__self__)


def _library_of(value: object) -> str | None:
    """The file of the C function `kernel` that this is Inductor's binding of; None for anything else."""
    if not isinstance(value, BuiltinFunctionType) or value.__name__ != "kernel":
        return None
    return getattr(value.__self__, "__file__", None)


@cache
def _address_of(library: str) -> int:
    found = ctypes.cast(ctypes.CDLL(library).kernel, ctypes.c_void_p).value
    assert found is not None, "a function has an address"
    return found


def _record_kernel(address: int, *arguments: Tensor | int) -> None:
    calls = recording()
    assert calls is not None, "a kernel of a recorded segment, and no recording"
    if not all(isinstance(each, Tensor | int) for each in arguments):
        raise NotRecordedError("a kernel takes other things than tensors and whole numbers")
    calls.add(address, arguments)
