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


def test_rounds_of_the_demo_models_length_take_as_long_as_full_ones() -> None:
    options = {"compressor": "snapkv", "keep": 0.2, "window": 32}
    ours = {"round_ms": 400.0, "ms_per_step": 15.0, "tokens_per_round": 32.0, "rows": 1}
    case = {"options": {**options, "placement": "host"}, "sides": {gpu.OURS: ours, gpu.PLAIN: {"tokens_per_s": 10.0}}}
    gpu.project({"acceptance": [{"options": options, "kept": [20, 20]}], "cases": [case]})
    assert ours["ms_per_step_as_demo"] == pytest.approx(480 / 20)
    assert case["sides"][gpu.PLAIN]["vericache_is_faster_as_demo"] == pytest.approx(1000 / 24 / 10)


def test_rows_of_a_batch_wait_for_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that was given more than the others keeps it, and what it is given beyond a window is lost."""
    monkeypatch.setattr(gpu, "ROUNDS", 2000)
    assert gpu.together([16], 5, 16) == 16
    alone, both = gpu.together([1, 16], 1, 16), gpu.together([1, 16], 5, 16)
    assert alone == pytest.approx(8.5, rel=0.05)
    assert 1 < both < alone


def test_what_is_hidden_is_what_a_round_with_full_kv_on_the_device_does_not_show() -> None:
    held = {"round_ms": 0.0, "draft_step_ms": 5.0, "verify_ms": 10.0, "bytes": {"draft": 0}}
    moved = {**held, "draft_step_ms": 5.1, "verify_ms": 12.0, "transfer_gb": 5.0, "link_gbps": 50.0}
    case = {"options": {"window": 32}, "sides": {gpu.HELD: held, gpu.OURS: moved}}
    gpu.floors({"bandwidth": {"memory_gbps": 4000.0, "link_gbps": 55.0}, "cases": [case]}, 16_000_000_000)
    assert moved["hidden_fraction"] == pytest.approx(1 - (31 * 0.1 + 2.0) / 100)
    assert moved["draft_step_over_floor"] == pytest.approx(5.1 / 4.0)
    assert moved["link_over_ceiling"] == pytest.approx(50 / 55)


def test_rounds_that_rested_say_nothing_of_rounds_with_drafts() -> None:
    options = {"compressor": "snapkv", "keep": 0.2, "window": 32}
    ours = {"round_ms": 400.0, "ms_per_step": 15.0, "tokens_per_round": 2.0, "rows": 1, "rounds_without_drafts": 64}
    case = {"options": options, "sides": {gpu.OURS: ours, gpu.PLAIN: {"tokens_per_s": 10.0}}}
    gpu.project({"acceptance": [{"options": options, "kept": [20, 20]}], "cases": [case]})
    assert "tokens_per_s_as_demo" not in ours
    assert "vericache_is_faster_as_demo" not in case["sides"][gpu.PLAIN]
