"""`vericache plot`: a picture from a run's statistics, and wrong input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from vericache_compile.cli import main

STATS = {
    "acceptance_by_position": [1.0, 0.5, 0.25],
    "latest_rounds": [{"began": 5.0 + i, "accepted": i, "rows": 1} for i in range(3)],
    "seconds": {"draft": 1.0, "verify": 2.0, "compile": 0.0},
}
HEADS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


def write(tmp_path: Path, held: object) -> str:
    path = tmp_path / "stats.json"
    path.write_text(json.dumps(held))
    return str(path)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("suffix", HEADS)
def test_a_picture_is_written(tmp_path: Path, suffix: str, wrapped: bool) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    picture = tmp_path / f"plot{suffix}"
    held = {"stats": STATS} if wrapped else STATS
    assert main(["plot", write(tmp_path, held), "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(HEADS[suffix])


def test_a_run_without_rounds_is_drawn_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    empty = {"acceptance_by_position": [], "latest_rounds": [], "seconds": {}}
    assert main(["plot", write(tmp_path, empty), "--output", str(tmp_path / "plot.png")]) == 0


@pytest.mark.parametrize(
    ("held", "output", "found"),
    [
        ({"rounds": 3}, "plot.png", "no acceptance_by_position, latest_rounds, seconds in it"),
        ([1], "plot.png", "no acceptance_by_position"),
        (STATS, "plot.bmp", "a picture of type '.bmp'"),
        (STATS, "missing/plot.png", "the picture cannot be written"),
    ],
)
def test_wrong_input_has_three_parts(
    tmp_path: Path, held: object, output: str, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")
    assert main(["plot", write(tmp_path, held), "--output", str(tmp_path / output)]) == 2
    said = capsys.readouterr().err
    assert found in said
    assert "where: " in said
    assert "fix: " in said


def test_a_file_that_is_no_json_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "stats.json").write_text("{")
    assert main(["plot", str(tmp_path / "stats.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", write(tmp_path, STATS)]) == 2
    assert "vericache-compile[plot]" in capsys.readouterr().err
