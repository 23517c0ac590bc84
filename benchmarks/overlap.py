"""How much of bringing full KV in is hidden under drafting? The demo model, full KV in host memory, a capped link.

A round with full KV on the device is measured first; the link is then capped so that a transfer takes a given share of
its drafting. The link's thread gets a core that computing leaves to it: a device's copy engine takes none from drafting
either. Sides are interleaved in one process, medians over rounds are reported, and tokens are compared. Prints a
table and writes benchmarks/results/overlap-<machine>.json, or the file of --json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from decode import document as prompt
from decode import load, machine, write
from rich.console import Console
from rich.table import Table

from vericache_compile import cli, stats
from vericache_compile.plan import Way
from vericache_compile.runtime.planner import Load

TOKENS, NEW, WINDOW = 4096, 160, 16
OPTIONS = {"compressor": "snapkv", "keep": 0.25, "window": WINDOW}


@dataclass(frozen=True)
class Case:
    """One shape of a round: the transfer's time as a share of drafting's, and the sites that the ring holds."""

    name: str
    draft_dtype: str
    share: float
    sites: int | None = None
    """None: all of them."""


CASES = (
    Case("transfer shorter than drafting", "same", 0.7),
    Case("transfer shorter, int8 drafts", "int8", 0.7),
    Case("transfer longer than drafting", "same", 2.0),
    Case("transfer shorter, a ring of 8 sites", "same", 0.7, 8),
)


@dataclass
class Side:
    """The model's compiled call under some options, and how many rounds it has done."""

    compiled: Any
    rounds: int
    """`stats` speaks of the side that ran last, so each side keeps its own count."""


def generate(model: Any, inputs: dict[str, torch.Tensor], side: Side) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Tokens of one generate call, and its rounds that drafted a whole window; the first of them warms up."""
    model._compiled_call_impl = side.compiled
    out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    made = stats(model)
    count, side.rounds = made["rounds"] - side.rounds, made["rounds"]
    latest = made["latest_rounds"][-count:] if count else []
    whole = [each for each in latest if each["drafted"] == WINDOW - 1]
    return out, whole[1:]


def compiled_with(model: Any, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> Side:
    """The model under these options, warm."""
    model._compiled_call_impl = None
    model.compile(backend="vericache", options={**OPTIONS, **options})
    held = model._compiled_call_impl
    model.generate(**inputs, max_new_tokens=2 * WINDOW, do_sample=False)
    return Side(held, stats(model)["rounds"])


def medians(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of a round, of its parts, and of the link; bytes that came over it."""
    if not rounds:
        raise SystemExit("no call had two rounds that drafted a whole window: nothing to take a median of")

    def middle(*path: str) -> float:
        values = [each[path[0]] if len(path) == 1 else each[path[0]][path[1]] for each in rounds]
        return statistics.median(values)

    whole = statistics.median(each["draft_seconds"] + each["verify_seconds"] for each in rounds)
    return {
        "rounds": len(rounds),
        "round_ms": 1e3 * whole,
        "draft_ms": 1e3 * middle("draft_seconds"),
        "verify_ms": 1e3 * middle("verify_seconds"),
        "transfer_ms": 1e3 * middle("traffic", "seconds"),
        "waited_ms": 1e3 * middle("traffic", "waited"),
        "bytes": middle("traffic", "nbytes"),
    }


def measure(model: Any, case: Case, inputs: dict[str, torch.Tensor], repeats: int) -> dict[str, Any]:
    """One case: the round with full KV on the device, and the same with full KV in host memory."""
    resident = compiled_with(model, inputs, {"draft_dtype": case.draft_dtype})
    _, rounds = generate(model, inputs, resident)
    first, sizes = medians(rounds), stats(model)["bytes"]
    site = sizes["full"] / stats(model)["sites"]
    sites = case.sites or stats(model)["sites"]
    gbps = TOKENS * sizes["per_token_full"] / (1e-3 * case.share * first["draft_ms"]) / 1e9
    staging = (sites + 0.5) * site / 2**20
    options = {"draft_dtype": case.draft_dtype, "placement": "host", "link_gbps": gbps, "staging_mb": staging}
    sides = {"device": resident, "host": compiled_with(model, inputs, options)}
    made: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    identical, held = True, {}
    for _ in range(repeats):
        outs = []
        for name, side in sides.items():
            out, rounds = generate(model, inputs, side)
            made[name] += rounds
            held[name] = stats(model)["bytes"]
            outs.append(out)
        identical &= torch.equal(*outs)
    device, host = (medians(made[side]) for side in ("device", "host"))
    expected = floor(device, host["transfer_ms"], sites / stats(model)["sites"])
    planned = plan({**OPTIONS, "draft_dtype": case.draft_dtype, "staging_mb": staging}, gbps)
    peak = held["host"]["draft"] + held["host"]["staging"] + held["host"]["full_on_device"]
    return {
        "case": case.name,
        "link_gbps": gbps,
        "sites_in_ring": sites,
        "device": device,
        "host": host,
        "identical": identical,
        "hidden_fraction": 1 - (host["round_ms"] - device["round_ms"]) / host["transfer_ms"],
        "over_expected": host["round_ms"] / expected,
        "device_bytes": {"planned": planned, "held": peak, "with_full_kv": held["device"]["draft"] + sizes["full"]},
    }


def plan(options: dict[str, Any], gbps: float) -> float:
    """Bytes on the device beside weights, as `vericache plan` says for a call of this benchmark on such a link."""
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--model", "demo", "--dtype", "float32", "--context", str(TOKENS + NEW), "--device", "cpu"]
    words += ["--device-memory", "100", "--memory-bandwidth", "10", "--link-bandwidth", str(gbps), "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        cli.main(["plan", *words])
    found = json.loads(out.getvalue())
    [swapped] = [each for each in found["choices"] if each["name"] == Way.SWAPPED]
    load = Load(**found["load"])
    return float(swapped["device_bytes"] - load.weights - load.copies)


def floor(device: dict[str, float], transfer_ms: float, share: float) -> float:
    """Milliseconds of a round that hides what it can: under drafting what the ring holds, the rest under verify."""
    draft, verify = device["draft_ms"], device["verify_ms"]
    return max(draft, share * transfer_ms) + max(verify, (1 - share) * transfer_ms)


def show(report: dict[str, Any], console: Console) -> None:
    """Print the table."""
    names = ("", "draft", "verify", "round", "transfer", "round, host", "hidden", "over the floor", "identical")
    title = (
        f"{report['machine']['device']}, {TOKENS:,} tokens, milliseconds; full KV on the device, then in host memory"
    )
    table = Table(*names, title=title, title_justify="left")
    for case in report["cases"]:
        device, host = case["device"], case["host"]
        table.add_row(
            case["case"],
            *(f"{device[name]:.1f}" for name in ("draft_ms", "verify_ms", "round_ms")),
            f"{host['transfer_ms']:.1f}",
            f"{host['round_ms']:.1f}",
            f"{case['hidden_fraction']:.1%}",
            f"{case['over_expected'] - 1:+.1%}",
            "yes" if case["identical"] else "NO",
        )
    console.print(table)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    console = Console(stderr=True, width=150)
    torch.set_num_threads(max(torch.get_num_threads() - 1, 1))
    model, inputs = load(), prompt(1, TOKENS)
    report: dict[str, Any] = {"machine": machine(), "tokens": TOKENS, "options": OPTIONS, "cases": []}
    for case in CASES:
        with console.status(case.name):
            report["cases"].append(measure(model, case, inputs, arguments.repeats))
        show(report, console)
    report["hidden_fraction"] = report["cases"][0]["hidden_fraction"]
    write("overlap", report, arguments.json)
    show(report, Console(width=150))


if __name__ == "__main__":
    main()
