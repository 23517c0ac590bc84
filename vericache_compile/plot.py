"""`vericache plot`: three pictures of a run's statistics in one file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vericache_compile.errors import VericacheError

NEEDED = ("acceptance_by_position", "latest_rounds", "seconds")
FORMATS = (".png", ".svg", ".pdf")


def plot(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Draw the statistics in a file that `vericache run --json` or `json.dump(stats(model))` wrote."""
    numbers = read_stats(Path(args.stats))
    path = Path(args.output)
    if path.suffix not in FORMATS:
        raise VericacheError(f"a picture of type {path.suffix!r}", f"--output {path}", f"use {', '.join(FORMATS)}")
    try:
        draw(numbers, path)
    except OSError as error:
        fix = "name a file in a folder that can be written to"
        raise VericacheError(f"the picture cannot be written: {error.strerror}", f"--output {path}", fix) from error
    print(f"wrote {path}")
    return {"picture": str(path)}, 0


def read_stats(path: Path) -> dict[str, Any]:
    """The statistics in a JSON file, by themselves or under "stats"; raises VericacheError."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found = f"the statistics cannot be read: {getattr(error, 'strerror', None) or error}"
        raise VericacheError(found, str(path), "name what `vericache run --json` printed") from error
    numbers = held.get("stats", held) if isinstance(held, dict) else {}
    missing = [name for name in NEEDED if not isinstance(numbers, dict) or name not in numbers]
    if missing:
        fix = "name what `vericache run --json` printed, or json.dump(vericache_compile.stats(model))"
        raise VericacheError(f"no {', '.join(missing)} in it", str(path), fix)
    assert isinstance(numbers, dict), "checked above"
    return numbers


def draw(numbers: dict[str, Any], path: Path) -> None:
    """Acceptance by place in the window, tokens per round over time, seconds by what they went to."""
    figure_of = _figure_class()
    figure = figure_of(figsize=(12, 3.6), layout="constrained")
    places, rounds, split = figure.subplots(1, 3)
    rates = numbers["acceptance_by_position"]
    places.bar(range(1, 1 + len(rates)), rates)
    places.set(title="acceptance by position", xlabel="place in the window", ylabel="accepted of drafted", ylim=(0, 1))
    latest = numbers["latest_rounds"]
    start = latest[0]["began"] if latest else 0.0
    times = [each["began"] - start for each in latest]
    tokens = [1 + each["accepted"] / each["rows"] for each in latest]
    rounds.plot(times, tokens, ".-")
    rounds.set(title="tokens per round", xlabel="seconds since the first round", ylabel="tokens per row")
    seconds = {name: value for name, value in numbers["seconds"].items() if value}
    split.barh(list(seconds), list(seconds.values()))
    split.set(title="time split", xlabel="seconds")
    figure.savefig(path)


def _figure_class() -> Any:
    """matplotlib's Figure, used without pyplot: no window, no display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        fix = 'pip install "vericache-compile[plot]"'
        raise VericacheError("matplotlib is not installed", "vericache plot", fix) from error
    return Figure
