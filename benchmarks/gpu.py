"""How fast is decoding long contexts on a GPU, when the KV cache may take so much of it and no more?

Sides: plain generate, a static cache under Inductor, transformers' cache offloaded to the host, and vericache; each
with as many rows as its KV budget lets it have. The model is of the 8B class with random weights, which costs no
download. They are drawn so that the next token is a permutation of this one, whatever attention adds: every draft is
right, which tells what a full round takes and nothing of how often drafts are right. That is measured apart, on the
demo model and a real text (`--acceptance`, on any machine), and the figures for such rounds are computed from both.

Writes results/gpu-<machine>.json. No side begins that would take it past --minutes if it took as long as the longest
before it; those are listed with that reason. Without a GPU it says so, and that is all; `--tiny` tries the program
itself on any machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from decode import Clock, document, machine, write

from vericache_compile import demo_model_path, stats
from vericache_compile.machine import measure

PLAIN, STATIC, OFFLOADED, OURS = "plain", "static cache, Inductor", "offloaded cache", "vericache"
HELD = "vericache, full KV on the device"
VARIANTS: dict[str, dict[str, Any]] = {OURS: {}, HELD: {"placement": "device"}}
"""Sides that are vericache, and the options that each adds to its case's."""
CACHES = {STATIC: {"cache_implementation": "static"}, OFFLOADED: {"cache_implementation": "offloaded"}}
LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
LOUD = 4.0
"""Standard deviation of the embedding, beside which what layers add is small."""
TEXT = 7000
"""Prompt tokens of the real text."""
PER_GIB = 1 << 30
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """One question: rows of a prompt, on each side as many as its budget allows."""

    name: str
    tokens: int
    rows: dict[str, int]
    """By side, in the order in which they run."""
    options: dict[str, Any] = field(default_factory=dict)
    budget_gib: float | None = None
    """KV that may lie on the device, where that is capped."""


SNAPKV = {"compressor": "snapkv"}
CAPPED = {**SNAPKV, "keep": 0.1, "window": 32, "placement": "host", "staging_mb": 1536}
SWAPPED = {**SNAPKV, "keep": 0.2, "window": 32, "placement": "host"}
RESIDENT = {**SNAPKV, "keep": 0.2, "placement": "device"}
CASES = (
    Case("capped at 0.2 of the KV of 5 rows", 32768, {PLAIN: 1, OURS: 5}, CAPPED, 4),
    Case("batch 1, full KV in host memory", 131072, {OFFLOADED: 1, OURS: 1}, SWAPPED),
    Case("full KV on the device", 32768, {PLAIN: 8, OURS: 7}, RESIDENT, 34),
    Case("one row", 32768, {STATIC: 1, HELD: 1, OURS: 1}, SWAPPED),
)
SMALL = (
    Case("on the device", 200, {PLAIN: 1, OURS: 1}, {**SNAPKV, "placement": "device"}),
    Case("capped", 800, {PLAIN: 1, OURS: 4}, {**SNAPKV, "placement": "host"}, 0.001),
)
STEPS = {PLAIN: 24, STATIC: 40, OFFLOADED: 14}
"""Tokens decoded."""
SETTLED = 8
"""Tokens, or of vericache rounds, after which steps are timed: compilation and recording lie before."""
ROUNDS = 100_000
"""Rounds drawn to find how many tokens several rows get of one."""
PERIOD = 128
"""Tokens of vericache that are timed: tails are compressed in once in so many."""


class SettledClock(Clock):
    """Notes when each token's logits are there, on the GPU too."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize(scores.device)
        return super().__call__(ids, scores)

    def after(self, settled: int) -> float:
        """Mean seconds per token from token `settled` on."""
        return (self.times[-1] - self.times[settled]) / (len(self.times) - 1 - settled)


def make_model(config: dict[str, int], dtype: torch.dtype, device: str, longest: int) -> Any:
    """A random Llama whose next token is a permutation of this one; greedy runs never stop early."""
    torch.manual_seed(0)
    own = transformers.LlamaConfig(**config, max_position_embeddings=longest)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(own, dtype=dtype).eval()
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding.normal_(std=LOUD)
        model.get_output_embeddings().weight[torch.randperm(len(embedding))] = 0.01 * embedding
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def run_side(model: Any, side: str, case: Case, device: str) -> tuple[dict[str, Any], torch.Tensor]:
    """({figures}, tokens of the first row) of one generate call."""
    new = STEPS.get(side) or steps_of(case)
    if side in VARIANTS:
        model.compile(backend="vericache", options=case.options | VARIANTS[side])
    rows, vocabulary = case.rows[side], model.config.vocab_size
    ids = torch.randint(1, vocabulary, (rows, case.tokens), generator=torch.Generator().manual_seed(1)).to(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock, began = SettledClock(), time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            logits_processor=[clock],
            **CACHES.get(side, {}),
        )
    made: dict[str, Any] = {
        "rows": rows,
        "first_token_s": clock.times[0] - began,
        "wall_s": time.perf_counter() - began,
        "peak_gib": torch.cuda.max_memory_allocated() / PER_GIB if device == "cuda" else None,
    }
    if side in VARIANTS:
        made |= rounds_of(stats(model), rows)
    else:
        made["ms_per_step"] = 1e3 * clock.after(SETTLED)
    made["tokens_per_s"] = 1e3 * rows / made["ms_per_step"]
    return made, out[0, case.tokens :].cpu()


def steps_of(case: Case) -> int:
    """Tokens that vericache decodes."""
    return (SETTLED + 2) * int(case.options.get("window", 16)) + PERIOD


def rounds_of(now: dict[str, Any], rows: int) -> dict[str, Any]:
    """Over the rounds after the first SETTLED: means of what rounds take as a whole, medians of their parts."""
    latest = now["latest_rounds"]
    settled = latest[SETTLED:-1]
    wall = 1e3 * (latest[-1]["began"] - latest[SETTLED]["began"]) / len(settled)
    device = statistics.mean(1e3 * (each["draft_seconds"] + each["verify_seconds"]) for each in settled)
    kept = statistics.mean(1 + each["accepted"] / rows for each in settled)
    made = {
        "placement": now["placement"],
        "rounds": len(latest),
        "rounds_without_drafts": now["rounds_without_drafts"],
        "compile_s": now["seconds"]["compile"],
        "prefill_s": now["seconds"]["prefill"],
        "ms_per_step": wall / kept,
        "tokens_per_round": kept,
        "round_ms": device,
        "serve_ms": (wall - device) / kept,
        "verify_ms": statistics.median(1e3 * each["verify_seconds"] for each in settled),
        "bytes": now["bytes"],
    }
    if drafted := [each for each in settled if each["drafted"]]:
        steps = (1e3 * rows * each["draft_seconds"] / each["drafted"] for each in drafted)
        made["draft_step_ms"] = statistics.median(steps)
    if traffic := [each["traffic"] for each in settled if each["traffic"]["seconds"]]:
        made["transfer_gb"] = statistics.median(each["nbytes"] / 1e9 for each in traffic)
        made["link_gbps"] = statistics.median(each["nbytes"] / 1e9 / each["seconds"] for each in traffic)
        made["waited_ms"] = statistics.median(1e3 * each["waited"] for each in traffic)
    return made


def measure_case(model: Any, case: Case, device: str, deadline: float, longest: float) -> dict[str, dict[str, Any]]:
    """By side its figures, or why there are none; the longest side before took so many seconds."""
    sides: dict[str, dict[str, Any]] = {}
    reference: torch.Tensor | None = None
    for side in case.rows:
        longest = max([longest, *(each.get("wall_s", 0.0) for each in sides.values())])
        if time.monotonic() + longest > deadline:
            sides[side] = {"not_run": "the time was over"}
            continue
        if side == OFFLOADED and device != "cuda":
            sides[side] = {"not_run": "transformers offloads from an accelerator only"}
            continue
        try:
            sides[side], out = run_side(model, side, case, device)
        except RuntimeError as error:  # no memory, say: the other sides still run
            sides[side] = {"not_run": str(error).splitlines()[0]}
            print(f"{case.name}: {side}, {sides[side]}", flush=True)
            continue
        finally:
            model._compiled_call_impl = None
            model.__dict__.pop("_compiled_call", None)  # generate's own, over a static cache: it holds its recordings
            torch._dynamo.reset()
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
        reference = out if reference is None else reference
        count = min(len(out), len(reference))
        sides[side]["same_tokens_as_the_first_side"] = torch.equal(out[:count], reference[:count])
        print(f"{case.name}: {side}, {json.dumps(sides[side])}", flush=True)
    return sides


def acceptance(cases: tuple[Case, ...]) -> list[dict[str, Any]]:
    """Rounds of the demo model over a real text, for the methods and windows of the cases."""
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 2
    made: list[dict[str, Any]] = []
    for case in cases:
        options = drafting(case.options)
        if OURS not in case.rows or any(each["options"] == options for each in made):
            continue
        torch._dynamo.reset()
        model.compile(backend="vericache", options={**options, "draft_dtype": "same"})
        model.generate(**document(1, TEXT), max_new_tokens=512, do_sample=False)
        now = stats(model)
        kept = [1 + each["accepted"] for each in now["latest_rounds"] if each["drafted"]]
        made.append({"options": options, "tokens_per_round": statistics.mean(kept), "kept": kept})
        print(made[-1], flush=True)
    return made


def known_acceptance() -> list[dict[str, Any]]:
    """What was measured of it, on whatever machine, the newest first."""
    paths = sorted(RESULTS.glob("acceptance-*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    reports = [json.loads(path.read_text()) for path in paths]
    return [{**each, "measured_on": report["machine"]["device"]} for report in reports for each in report["rounds"]]


def drafting(options: dict[str, Any]) -> dict[str, Any]:
    """Those options that decide what is drafted."""
    return {"window": 16, **{name: options[name] for name in ("compressor", "keep", "window") if name in options}}


def project(report: dict[str, Any]) -> None:
    """What a step would take if rounds gave as many tokens as the demo model's, and what follows from both.

    Whatever a round takes, serving its tokens included, is taken to be the same for fewer tokens.
    """
    for case in report["cases"]:
        found = [each for each in report["acceptance"] if each["options"] == drafting(case["options"])]
        for ours in own_sides(case) if found else ():
            if ours.get("rounds_without_drafts"):
                continue  # what those rounds take says nothing of what one with drafts does
            kept = together(found[0]["kept"], ours["rows"], found[0]["options"]["window"])
            ours["demo_tokens_per_round"] = kept
            ours["ms_per_step_as_demo"] = step = ours["ms_per_step"] * ours["tokens_per_round"] / kept
            ours["tokens_per_s_as_demo"] = 1e3 * ours["rows"] / step
        rates = [case["sides"].get(side, {}).get("tokens_per_s_as_demo") for side in (HELD, OURS)]
        for side, other in case["sides"].items():
            rate = rates[0] or rates[1]  # where full KV may lie on the device, both have it there
            if side not in VARIANTS and "tokens_per_s" in other and rate:
                other["vericache_is_faster_as_demo"] = rate / other["tokens_per_s"]


def own_sides(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Those sides of a case that are vericache and have run."""
    return [made for side, made in case["sides"].items() if side in VARIANTS and "round_ms" in made]


def together(kept: list[int], rows: int, window: int) -> float:
    """Tokens per row and round of several rows, whose rounds keep so many tokens by chance.

    A round begins when a row has none left, and those that hold a window or more take no part in it.
    """
    draw, held, tokens = random.Random(0), [0] * rows, 0
    for _ in range(ROUNDS):
        held = [own if own >= window else own + draw.choice(kept) for own in held]
        taken = min(held)
        held = [own - taken for own in held]
        tokens += taken
    return tokens / ROUNDS


def floors(report: dict[str, Any], weights: int) -> None:
    """What a draft step's bytes take at the bandwidth of a copy, what comes in at the link's, and how much of that
    time a round of median steps does not show beside one with full KV on the device."""
    bandwidth = report["bandwidth"]
    for case in report["cases"]:
        for ours in own_sides(case):
            if "draft_step_ms" in ours:
                floor = (weights + ours["bytes"]["draft"]) / bandwidth["memory_gbps"] / 1e6
                ours["draft_step_over_floor"] = ours["draft_step_ms"] / floor
            if "link_gbps" in ours:
                ours["link_over_ceiling"] = ours["link_gbps"] / bandwidth["link_gbps"]
        held, moved = (case["sides"].get(side, {}) for side in (HELD, OURS))
        if "draft_step_ms" in held and "link_gbps" in moved:
            transfer = 1e3 * moved["transfer_gb"] / moved["link_gbps"]
            steps = int(case["options"].get("window", 16)) - 1
            rounds = [steps * each["draft_step_ms"] + each["verify_ms"] for each in (held, moved)]
            moved["hidden_fraction"] = min(1 - (rounds[1] - rounds[0]) / transfer, 1.0)


def markdown(report: dict[str, Any]) -> str:
    """The table of a report, as docs/gpu.md has it."""
    lines = ["| case | side | rows | ms per step | tokens/s | peak GiB | vericache at the demo model's acceptance |"]
    lines.append("|---|---|---|---|---|---|---|")
    for case in report["cases"]:
        for side, made in case["sides"].items():
            about = f"| {case['name']}, {case['prompt_tokens']:,} tokens | {side} |"
            if "not_run" in made:
                lines.append(f"{about} | | | | not run: {made['not_run'].split('. ')[0]} |")
                continue
            faster = made.get("vericache_is_faster_as_demo")
            as_demo = f"{faster:.1f}x as fast" if faster else ""
            if "tokens_per_s_as_demo" in made:
                rate, kept = made["tokens_per_s_as_demo"], made["demo_tokens_per_round"]
                as_demo = f"{made['ms_per_step_as_demo']:.1f} ms, {rate:.0f} tokens/s ({kept:.1f} tokens per round)"
            figures = (
                f"{made['rows']} | {made['ms_per_step']:.1f} | {made['tokens_per_s']:.1f} | {made['peak_gib']:.0f}"
            )
            lines.append(f"{about} {figures} | {as_demo} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short prompts, on any device")
    parser.add_argument("--minutes", type=float, default=7.5, help="what would take longer is not run")
    parser.add_argument("--cases", type=int, nargs="*", help="which of the cases, from 0")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON, added to those of each case")
    parser.add_argument("--acceptance", action="store_true", help="measure how many tokens a round gives, and no speed")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--markdown", type=Path, help="print the table of this JSON, and measure nothing")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    deadline = time.monotonic()
    arguments = parse_arguments()
    deadline += 60 * arguments.minutes
    if arguments.markdown:
        print(markdown(json.loads(arguments.markdown.read_text())))
        return
    if arguments.acceptance:
        write("acceptance", {"machine": machine(), "prompt_tokens": TEXT, "rounds": acceptance(CASES)}, arguments.out)
        for path in sorted(RESULTS.glob("gpu-*.json")):
            report = json.loads(path.read_text()) | {"acceptance": known_acceptance()}
            project(report)
            write("gpu", report, path)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        print(json.dumps({"ran": False, "reason": f"no CUDA device; torch {torch.__version__} sees none"}))
        return
    config, dtype, cases = (TINY, torch.float32, SMALL) if arguments.tiny else (LARGE, torch.bfloat16, CASES)
    chosen = cases if arguments.cases is None else tuple(cases[i] for i in arguments.cases)
    cases = tuple(replace(case, options={**case.options, **arguments.options}) for case in chosen)
    own = machine()
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        own |= {"device": found.name, "gpu_gib": found.total_memory / PER_GIB, "cuda": torch.version.cuda}
        own["allocator"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    report: dict[str, Any] = {
        "ran": True,
        "machine": own,
        "bandwidth": vars(measure(torch.device(device))),
        "model": config,
        "dtype": str(dtype),
        "acceptance": known_acceptance(),
        "cases": [],
    }
    longest = 0.0
    for case in cases:
        model = make_model(config, dtype, device, case.tokens + steps_of(case))  # counts go with it: one per case
        sides = measure_case(model, case, device, deadline, longest)
        longest = max([longest, *(each.get("wall_s", 0.0) for each in sides.values())])
        about = {
            "name": case.name,
            "prompt_tokens": case.tokens,
            "budget_gib": case.budget_gib,
            "options": case.options,
        }
        report["cases"].append({**about, "sides": sides})
        project(report)
        floors(report, sum(x.nbytes for x in model.parameters()) - model.get_input_embeddings().weight.nbytes)
        write("gpu", report, arguments.out)  # after each case: what a time limit cuts off loses no more than its own
        del model


if __name__ == "__main__":
    main()
