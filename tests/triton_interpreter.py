"""Triton's interpreter on the CPU, for tests where there is no GPU.

It has to be chosen before triton is imported, which compiling for a CPU does too; so importing this file chooses it.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

from vericache_compile.kernels import launch

HAS_TRITON = importlib.util.find_spec("triton") is not None


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch the kernels on the CPU from here to the end of the test; skips where the interpreter is not to be had."""
    if not HAS_TRITON:
        pytest.skip("triton is not installed; it exists for Linux only")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("this process compiles kernels for its GPU; the interpreter's tests run where there is none")
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_dot", multiply)
    monkeypatch.setattr(launch, "DEVICE", "cpu")
    monkeypatch.setattr(launch, "installed", lambda: True)


def multiply(builder: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """A matrix product as a GPU's: any type, float32 sums, every row the same way.

    The interpreter's own takes bfloat16 numbers for integers, and numpy's library sums rows in different orders.
    """
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    left, right = (_widen(x) for x in (a, b))
    return TensorHandle(np.einsum("ik,kj->ij", left, right, optimize=False) + d.data, d.dtype.scalar)


def _widen(handle: Any) -> Any:
    import numpy as np
    import triton.language as tl

    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)
