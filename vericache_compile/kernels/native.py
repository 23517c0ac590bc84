"""The kernels of the CPU, in C++: one library, built at first use by Inductor's builder.

VERICACHE_KERNELS=0 leaves everything to torch's kernels.
"""

from __future__ import annotations

import ctypes
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = (
    "lanes.h",
    "block_attention.cpp",
    "row_invariant_linear.cpp",
    "int8_linear.cpp",
    "draft_step.cpp",
    "calls.cpp",
)
FUNCTIONS = {
    "workspace": 4, "attend": 13, "multiply_rows": 12, "multiply_int8": 8, "begin_step": 8, "write_rows": 11,
    "end_step": 9, "make_calls": 4,
}  # fmt: skip
"""How many arguments each takes: whole numbers and addresses, each 64 bits wide."""
FLAGS = ("-fno-unsafe-math-optimizations", "-fno-finite-math-only", "-ffp-contract=off")
"""Sums keep their order and NaN its meaning, whatever Inductor is set to; what fuses is written so."""


@cache
def load() -> ctypes.CDLL | None:
    """The library, kept on disk in Inductor's cache; None where it cannot be built (no C++ compiler)."""
    return start_build().result()


@cache
def start_build() -> Future[ctypes.CDLL | None]:
    """Build the library beside whatever else is being compiled; `load` waits for it."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="vericache-build")
    building = pool.submit(_build)
    pool.shutdown(wait=False)  # its thread ends with this task
    return building


def _build() -> ctypes.CDLL | None:
    if os.environ.get("VERICACHE_KERNELS") == "0":
        return None
    source = "\n".join(Path(__file__).with_name(name).read_text() for name in SOURCES)
    try:
        from torch._inductor.codecache import CppCodeCache

        library: ctypes.CDLL = CppCodeCache.load(source, extra_flags=FLAGS)
    except Exception as error:  # noqa: BLE001 - whatever a compiler does, torch's kernels serve
        log.warning(
            "vericache: its kernels for the CPU could not be built: %s\n  where: %s\n  fix: %s",
            f"{type(error).__name__}: {error}",
            Path(__file__).parent,
            "see `vericache doctor`; until then torch's kernels run, with the same tokens, slower",
        )
        return None
    for name, arguments in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_int64] * arguments, ctypes.c_int64
    return library
