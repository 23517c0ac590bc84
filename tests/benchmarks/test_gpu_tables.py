"""The page on GPUs has the tables that the benchmarks make of their committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu
import kernels
import pytest

ROOT = Path(__file__).parents[2]


def report(name: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}-nvidia-h200.json").read_text())
    return made


def test_the_page_says_what_was_measured() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert gpu.markdown(report("gpu")) in page
    assert kernels.markdown(report("kernels")) in page
    readme = (ROOT / "README.md").read_text()
    for case in report("gpu")["cases"]:
        ours = case["sides"][gpu.OURS]
        assert f"{ours['tokens_per_s_as_demo']:.0f} ({ours['demo_tokens_per_round']:.1f} per round)" in readme


def test_what_did_not_run_has_its_reason() -> None:
    case = {
        "name": "a case",
        "prompt_tokens": 32768,
        "sides": {"plain": {"not_run": "CUDA out of memory. Tried to ..."}},
    }
    assert gpu.markdown({"cases": [case]}).splitlines()[-1].endswith("| not run: CUDA out of memory |")


def test_a_step_at_the_demo_models_acceptance_is_made_of_its_rounds() -> None:
    ours = {"round_ms": 400.0, "serve_ms": 2.0, "rows": 5}
    options = {"compressor": "snapkv", "keep": 0.2, "window": 32}
    case = {"options": {**options, "placement": "host"}, "sides": {gpu.OURS: ours, gpu.PLAIN: {"tokens_per_s": 10.0}}}
    gpu.project({"acceptance": [{"options": options, "tokens_per_round": 20.0}], "cases": [case]})
    assert ours["ms_per_step_as_demo"] == pytest.approx(22.0)
    assert case["sides"][gpu.PLAIN]["vericache_is_faster_as_demo"] == pytest.approx(5000 / 22 / 10)
