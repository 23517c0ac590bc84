"""What was measured of compressors, as a page: each share a table, best first, and who is worse than `streaming`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import frontier
import pytest


def run(method: str, share: float, prompt: str, rate: float, alone: int | None = None) -> dict[str, Any]:
    seconds = {"compress_seconds": 0.2, "observe_seconds": 0.0, "repeat_seconds": 0.0}
    seconds["read_seconds"] = 10.0 if prompt == "code" else 20.0
    measured = {"bytes_per_token": 100 * share, "full_bytes_per_token": 100, **seconds}
    found = {"draft_step_ms": 20.0, "alone_diverges_at": alone, "identical": True, "prompt_tokens": 3000}
    named = {"method": method, "share": share, "prompt": prompt, "compressor": f"{method}(keep={share})"}
    other = {"streaming": {"tokens_per_round": 9.0 if prompt == "code" else 5.0}}
    return {**named, "tokens_per_round": rate, **measured, **found, **other}


@pytest.fixture
def report() -> dict[str, Any]:
    rates = {"streaming": (9.0, 5.0), "mine": (12.0, 4.0), "best": (16.0, 15.0)}
    return {
        "machine": {"device": "a CPU", "threads": 2, "torch": "2.13.0", "transformers": "5.23.0"},
        "new_tokens": 128,
        "runs": [
            run(method, share, prompt, rate)
            for share in (0.25, 0.5)
            for method, both in rates.items()
            for prompt, rate in zip(("code", "summary"), both, strict=True)
        ],
    }


def test_a_page_has_a_table_per_share_best_first(report: dict[str, Any]) -> None:
    page = frontier.markdown([report])
    assert page.count("## At ") == 2
    first = page.split("## At 25% of the bytes\n\n")[1].split("\n\n")[1].splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in first[2:]] == ["best", "mine", "streaming"]
    assert first[2] == (
        "| best | best(keep=0.25) | 25% | 16.0 | 15.0 | 15.5 | 1.5% | 20 ms | never never | better | yes |"
    )
    assert "worse: summary" in first[3]
    assert len({line.count("|") for line in first}) == 1


def test_a_run_that_is_not_finished_can_be_shown(report: dict[str, Any], tmp_path: Path) -> None:
    report["runs"] = [*report["runs"][:3], run("mine", 0.3, "code", 9.0) | {"share": "default"}]
    assert frontier.table(report).row_count == 3
    frontier.plot([report], tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_the_documents_say_what_was_measured() -> None:
    root = Path(__file__).parents[2]
    files = ("compressors-intel-xeon.json", "compressors-defaults-intel-xeon.json")
    report, *others = (json.loads((root / "benchmarks/results" / file).read_text()) for file in files)
    page = frontier.markdown([report, *others])
    assert (root / "docs/compressors/measured.md").read_text() == page
    assert "not known" not in page
    readme = (root / "README.md").read_text()
    for point in frontier.points(report):
        if "+" in point.method:
            continue
        [row] = re.findall(rf"^\| `(?:int8`, `)?{point.method}`.*\|$", readme, re.MULTILINE)
        rates = ", ".join(f"{point.runs[name]['tokens_per_round']:.1f}" for name in frontier.prompts_of(report))
        kib = frontier.mean(run["bytes_per_token"] for run in point.runs.values()) / 1024
        inside = next(iter(point.runs.values()))["compressor"].partition("(")[2].removesuffix(")")
        assert f"| `{inside}` |" in row or (not inside and "| these |" in row)
        assert rates in row
        assert f"{kib:.1f}" in row
