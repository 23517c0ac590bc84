"""What do capture and all passes cost on a model of 30 layers, without Inductor, and how much of that is Dynamo's?

Prints and writes benchmarks/results/capture-<machine>.json: medians over fresh processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from decode import machine, write
from rich.console import Console

CAPTURE = """
import json, sys, time
sys.path.insert(0, {here!r})
from decode import document, load
from vericache_compile import explain
from vericache_compile.passes import pipeline

model, inputs, spent = load(), document(1, 64), {{}}
real = pipeline.run

def run(program, passes, observers=()):
    for each in passes:
        began = time.perf_counter()
        real(program, (each,), observers)
        name = getattr(each, "func", each).__name__
        spent[name] = spent.get(name, 0) + time.perf_counter() - began

pipeline.run = run
began = time.perf_counter()
found = explain(model, **inputs, options={options!r})
seconds = time.perf_counter() - began
assert found.sites and not found.not_taken, found
print(json.dumps({{"seconds": seconds, "passes": spent}}))
"""


def capture(options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one fresh process: {seconds: of all, passes: {name: seconds}}."""
    program = CAPTURE.format(here=str(Path(__file__).parent), options=options)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    held: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return held


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=3)
    asked = parser.parse_args()
    options = {"compressor": "snapkv", "keep": 0.25}
    runs = []
    with Console(stderr=True).status("captures in fresh processes"):
        for _ in range(asked.processes):
            runs.append(capture(options))
    names = runs[0]["passes"]
    report = {
        "machine": machine(),
        "options": options,
        "seconds": statistics.median(run["seconds"] for run in runs),
        "passes_seconds": statistics.median(sum(run["passes"].values()) for run in runs),
        "passes": {name: statistics.median(run["passes"][name] for run in runs) for name in names},
    }
    print(json.dumps(report, indent=2))
    write("capture", report, None)


if __name__ == "__main__":
    main()
