"""How fast is decoding: plain generate, a static cache under Inductor, vericache, and at rest, on the demo model?

Prints a table and writes benchmarks/results/decode-<machine>.json. Sides are interleaved in one process, medians are
reported, and every run's tokens are compared.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from rich.console import Console
from rich.table import Table

from vericache_compile import demo_model_path, stats
from vericache_compile.runtime import rounds

CASES = ((1, 4096), (1, 7500), (4, 4096))
PLAIN, STATIC, OURS, EXACT = "plain", "static cache, Inductor", "vericache", "vericache, same draft_dtype"
RESTING = "vericache at rest"
"""Without drafts, as where they do not pay."""
SIDES = (PLAIN, STATIC, OURS, EXACT, RESTING)
BY_ROUNDS = (OURS, EXACT, RESTING)
OWN = {EXACT: {"draft_dtype": "same"}, RESTING: {"device_memory_mb": 1e6}}
"""Options that set a side apart from `OURS`; the last changes nothing, but the side has counts of its own."""
NEW = 128
WIDTH = 150


class Clock:
    """A logits processor that notes when each token's logits arrive."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores

    @property
    def per_token(self) -> float:
        """Mean seconds per decoded token; the first token is prefill's."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def load(dtype: torch.dtype = torch.float32) -> Any:
    """The demo model; greedy runs never stop early."""
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=dtype).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 2
    return model


def document(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """Rows of a text that ships with Python: {input_ids, attention_mask} [batch, tokens]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model_path())
    ids = tokenizer(inspect.getsource(argparse), return_tensors="pt").input_ids[0]
    rows = torch.stack([ids.roll(-200 * b)[:tokens] for b in range(batch)])
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def compile_side(model: Any, side: str, options: dict[str, Any]) -> None:
    """Set the model up for one side."""
    model._compiled_call_impl = None
    if side in BY_ROUNDS:
        model.compile(backend="vericache", options=options | OWN.get(side, {}))
    elif side != PLAIN:
        model.compile()


def run(
    model: Any, side: str, inputs: dict[str, torch.Tensor], count: int, compiled: dict[str, Any]
) -> tuple[float, torch.Tensor]:
    """(seconds per token, tokens) of one generate call."""
    model._compiled_call_impl = compiled[side]
    more = {"cache_implementation": "static"} if side == STATIC else {}
    clock = Clock()
    rests = patch.object(rounds, "next_steps", lambda *_: 0) if side == RESTING else nullcontext()
    with rests:
        out = model.generate(**inputs, max_new_tokens=count, do_sample=False, logits_processor=[clock], **more)
    return clock.per_token, out


def measure(
    model: Any, batch: int, tokens: int, options: dict[str, Any], repeats: int, sides: list[str]
) -> dict[str, Any]:
    """One case: medians per side and whether all tokens were the plain ones."""
    inputs = document(batch, tokens)
    compiled = {}
    for side in sides:
        compile_side(model, side, options)
        compiled[side] = model._compiled_call_impl
        run(model, side, inputs, 20, compiled)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    identical = dict.fromkeys(sides, True)
    made: dict[str, dict[str, Any]] = {}
    readings: dict[str, dict[str, Any]] = {}
    for _ in range(repeats):
        reference = None
        for side in sides:
            per_token, out = run(model, side, inputs, NEW, compiled)
            seconds[side].append(per_token)
            reference = out if reference is None else reference
            identical[side] &= torch.equal(out, reference)
            if side in BY_ROUNDS:
                now = stats(model)
                made[side] = per_round(readings.get(side), now, batch)
                readings[side] = now
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "batch": batch,
        "prompt_tokens": tokens,
        "new_tokens": NEW,
        "ms_per_step": {side: 1e3 * value for side, value in medians.items()},
        "all_ms_per_step": {side: [1e3 * v for v in values] for side, values in seconds.items()},
        "speedup_over_plain": {side: medians[PLAIN] / value for side, value in medians.items()},
        "identical": identical,
        "rounds": made,
    }


def per_round(before: dict[str, Any] | None, after: dict[str, Any], batch: int) -> dict[str, Any]:
    """What one side's rounds did between two readings of its statistics (from the start when there is no first)."""

    def grown(*path: str) -> float:
        first: Any = before
        last: Any = after
        for name in path:
            first, last = None if first is None else first[name], last[name]
        return float(last - (first or 0))

    count, drafted = grown("rounds"), grown("drafted")
    return {
        "tokens_per_round": grown("served_rows") / count / batch,
        "draft_step_ms": 1e3 * batch * grown("seconds", "draft") / drafted if drafted else None,
        "verify_ms": 1e3 * grown("seconds", "verify") / count,
        "bytes": after["bytes"],
    }


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")),
            name,
        )
    return {
        "device": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def show(report: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(
        title=f"{report['machine']['device']}, {report['machine']['threads']} threads, {report['dtype']}, "
        "ms per decode step"
    )
    for column in ("batch x prompt", *report["sides"], "tokens per round", "identical"):
        table.add_column(column)
    for case in report["cases"]:
        steps, faster = case["ms_per_step"], case["speedup_over_plain"]
        table.add_row(
            f"{case['batch']} x {case['prompt_tokens']}",
            *(f"{steps[side]:.1f} ({faster[side]:.2f}x)" if side in steps else "" for side in report["sides"]),
            " / ".join(f"{found['tokens_per_round']:.1f}" for found in case["rounds"].values()),
            "yes" if all(case["identical"][side] for side in case["rounds"]) else "NO",
        )
    console.print(table)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and KV")
    parser.add_argument(
        "--cases", nargs="*", default=[f"{b}x{t}" for b, t in CASES], help="batch x prompt tokens, as 1x4096"
    )
    parser.add_argument("--all-sides", nargs="*", default=["1x4096"], help="cases that the other sides run too")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    console = Console(stderr=True, width=WIDTH)
    options = {"compressor": "snapkv", "keep": arguments.keep}
    model = load(getattr(torch, arguments.dtype))
    report: dict[str, Any] = {
        "machine": machine(),
        "dtype": arguments.dtype,
        "options": options,
        "sides": list(SIDES),
        "cases": [],
    }
    for case in arguments.cases:
        batch, tokens = (int(part) for part in case.split("x"))
        with console.status(f"batch {batch}, prompt of {tokens} tokens"):
            torch._dynamo.reset()
            sides = [side for side in SIDES if side in (PLAIN, OURS, RESTING) or case in arguments.all_sides]
            report["cases"].append(measure(model, batch, tokens, options, arguments.repeats, sides))
        show(report, console)
    write("decode" if arguments.dtype == "float32" else f"decode-{arguments.dtype}", report, arguments.out)
    show(report, Console(width=WIDTH))


def write(question: str, report: dict[str, Any], out: Path | None) -> None:
    """Write results/<question>-<machine>.json, or `out`."""
    label = "".join(c if c.isalnum() else "-" for c in report["machine"]["device"]).strip("-").lower()
    out = out or Path(__file__).parent / "results" / f"{question}-{label}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
