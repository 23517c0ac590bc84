"""The GPU benchmark says why it does not run where there is no GPU, and its program is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    ran = run()
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["ran"] is False
    assert "no CUDA device" in said["reason"]


@pytest.mark.slow
def test_the_tiny_configuration_runs_anywhere(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    ran = run("--tiny", "--options", '{"inductor": false}', "--out", str(out))
    assert ran.returncode == 0, ran.stderr
    report = json.loads(out.read_text())
    for case in report["cases"]:
        assert case["sides"]["vericache"]["ms_per_step"] > 0
        assert case["sides"]["vericache"]["same_tokens_as_the_first_side"]
        ours = case["sides"]["vericache"]
        rested = ours["rounds_without_drafts"] > 0  # which is the clock's to say
        assert rested or ours["tokens_per_round"] == 16, "every draft is right"
    small, large = report["cases"]
    assert (small["sides"]["vericache"]["placement"], large["sides"]["vericache"]["placement"]) == ("device", "host")
    assert (large["sides"]["plain"]["rows"], large["sides"]["vericache"]["rows"]) == (1, 4)


@pytest.mark.slow
def test_what_does_not_fit_the_time_is_listed(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert run("--tiny", "--minutes", "0", "--out", str(out)).returncode == 0
    sides = json.loads(out.read_text())["cases"][0]["sides"]
    assert all(side.get("not_run") for side in sides.values())
