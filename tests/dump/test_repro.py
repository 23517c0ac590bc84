"""Repro files run by themselves, and verify's checks itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from graphs import run_until, tiny_decode

from vericache_compile.dump.repro import repro


def run(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(path), *words], capture_output=True, text=True, timeout=300, check=False, cwd=path.parent
    )


@pytest.mark.parametrize(
    ("name", "batch", "loop"),
    [
        ("llama", 1, "generate"),
        pytest.param("gpt2", 3, "generate", marks=pytest.mark.slow),
        pytest.param("qwen3", 3, "masked", marks=pytest.mark.slow),
        pytest.param("llama", 3, "static", marks=pytest.mark.slow),
    ],
)
def test_verify_over_a_window_gives_what_the_captured_step_gives(
    tmp_path: Path, name: str, batch: int, loop: str
) -> None:
    path = tmp_path / "repro_verify.py"
    path.write_text(repro(run_until(tiny_decode(name, batch, loop), "lower", batch=batch), "verify"))
    done = run(path, "--check")
    assert done.returncode == 0, done.stderr
    assert f"verify gave torch.float32 [4, {batch}, 1, 97]" in done.stdout
    assert ", within 0.001" in done.stdout


def test_the_check_can_say_no(tmp_path: Path) -> None:
    path = tmp_path / "repro_verify.py"
    text = repro(run_until(tiny_decode("llama", 1), "lower"), "verify")
    broken = text.replace("torch.ops.aten.add.Tensor(", "torch.ops.aten.sub.Tensor(", 40)
    assert broken != text
    path.write_text(broken)
    done = run(path, "--check")
    assert done.returncode == 1, done.stderr
    assert "NOT within" in done.stdout


@pytest.mark.slow
def test_draft_runs_and_says_that_it_cannot_be_checked(tmp_path: Path) -> None:
    path = tmp_path / "repro_draft.py"
    path.write_text(repro(run_until(tiny_decode("llama", 1), "lower"), "draft"))
    assert "draft gave torch.int64 [1, 1]" in run(path).stdout
    assert run(path, "--check").returncode == 2
