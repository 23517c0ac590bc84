"""What does a first call cost, all compilation in it, and what does a call that is answered from held rows?

Prints and writes benchmarks/results/first-call-<machine>.json. First calls are those of fresh processes with cold
caches, under Inductor with a static cache and under vericache; beside a held row stands a backend that does nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from decode import OURS, STATIC, document, load, machine, write
from rich.console import Console

FIRST_CALL = """
import sys, time, torch
sys.path.insert(0, {here!r})
from decode import compile_side, document, load
model, inputs = load(), document(1, 512)
model.generate(**inputs, max_new_tokens=8, do_sample=False)
plain = time.perf_counter()
model.generate(**inputs, max_new_tokens=40, do_sample=False)
plain = time.perf_counter() - plain
compile_side(model, {side!r}, {options!r})
first = time.perf_counter()
model.generate(**inputs, max_new_tokens=40, do_sample=False{more})
print(time.perf_counter() - first, plain)
"""


def first_call(side: str, options: dict[str, Any]) -> dict[str, float]:
    """Seconds of the first generate call (512-token prompt, 40 tokens) in a fresh process with empty caches."""
    more = ', cache_implementation="static"' if side == STATIC else ""
    program = FIRST_CALL.format(here=str(Path(__file__).parent), side=side, options=options, more=more)
    with tempfile.TemporaryDirectory() as cold:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cold, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
    seconds, plain = (float(x) for x in done.stdout.split()[-2:])
    return {"seconds": seconds, "plain_seconds": plain}


def served_row(model: Any, options: dict[str, Any]) -> dict[str, float]:
    """Median milliseconds of a call answered from held rows, and of one into a backend that does nothing."""
    inputs = document(1, 512)

    def times(backend: Callable[..., Any] | str, **more: Any) -> float:
        torch._dynamo.reset()
        model._compiled_call_impl = None
        model.compile(backend=backend, **more)
        cache, ids, seen = transformers.DynamicCache(config=model.config), inputs["input_ids"], []
        with torch.no_grad():
            for _ in range(80):
                began = time.perf_counter()
                out = model(input_ids=ids, past_key_values=cache)
                seen.append(time.perf_counter() - began)
                ids = out.logits[:, -1:].argmax(-1)
        return 1e3 * statistics.median(seen[20:])

    def hollow(graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        return _returns_at_once(graph)

    return {"vericache_ms": times("vericache", options=options), "empty_backend_ms": times(hollow)}


def _returns_at_once(graph: torch.fx.GraphModule) -> Callable[..., Any]:
    """Runs prefill for real and then answers each decode step with ready-made tensors: Dynamo's own overhead."""
    node = next(iter(graph.graph.find_nodes(op="output")))
    fakes = [n.meta["example_value"] for n in node.args[0]]

    def call(*inputs: Any) -> list[torch.Tensor]:
        if any(isinstance(x, torch.Tensor) and x.dim() == 4 for x in inputs):
            past = next(x.shape[2] for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 4) + 1
            return [
                torch.zeros(()).expand([past if i == 2 and f.dim() == 4 else int(s) for i, s in enumerate(f.shape)])
                for f in fakes
            ]
        return graph(*inputs)

    return call


def main() -> None:
    """Run the benchmark."""
    console, options = Console(stderr=True), {"compressor": "snapkv", "keep": 0.25}
    report: dict[str, Any] = {"machine": machine(), "options": options}
    with console.status("held rows"):
        report["served_row"] = served_row(load(), options)
    with console.status("first calls in fresh processes"):
        report["first_call"] = {side: first_call(side, options) for side in (STATIC, OURS)}
    print(json.dumps({name: report[name] for name in ("served_row", "first_call")}, indent=2))
    write("first-call", report, None)


if __name__ == "__main__":
    main()
