"""Triton's compiler takes the programs for real GPUs, and they fit: no GPU is needed to compile for one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton_interpreter

SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one program may take, by compute capability (CUDA C++ Programming Guide)."""


@pytest.mark.parametrize(
    ("capability", "dtype", "size"),
    [
        (90, "bf16", 128),
        *(
            pytest.param(capability, dtype, size, marks=pytest.mark.slow)
            for capability in SHARED
            for dtype in ("bf16", "fp32")
            for size in (128, 256)
        ),
    ],
)
def test_programs_compile_and_fit(capability: int, dtype: str, size: int, tmp_path: Path) -> None:
    if not triton_interpreter.HAS_TRITON:
        pytest.skip("triton is not installed; it exists for Linux only")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, Path(__file__).with_name("compile_for_gpu.py"), str(capability), dtype, str(size)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    made = json.loads(ran.stdout)
    assert len(made) == 10
    assert max(made.values()) <= SHARED[capability], made
