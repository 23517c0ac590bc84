"""How fast is decoding long contexts on a GPU, when the KV cache may take so much of it and no more?

Sides: plain generate, a static cache under Inductor, transformers' cache offloaded to the host, and vericache. The
model is of the 8B class with random weights, which costs no download; how many tokens a round gives is measured apart,
on the demo model and a real text, because random weights say nothing of it. Writes results/gpu-<machine>.json and
takes under eight minutes: what no longer fits in them is not run, and is listed with its reason.

Without a GPU it says so, and that is all; `--tiny` tries the program itself on any machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from decode import Clock, document, machine, per_round, write

from vericache_compile import demo_model_path, stats

PLAIN, STATIC, OFFLOADED, OURS = "plain", "static cache, Inductor", "offloaded cache", "vericache"
SIDES = (PLAIN, OURS, STATIC, OFFLOADED)
"""In the order of their importance: the last are left out first."""
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


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    config: dict[str, int]
    dtype: torch.dtype
    cases: tuple[tuple[int, int], ...]
    """(rows, prompt tokens)."""
    kv_budget: int
    """Bytes of KV that may lie on the device."""
    new: int
    """Tokens decoded."""
    settled: int
    """Tokens of them after which steps are timed: compilation and recording lie before."""
    acceptance_tokens: int
    """Prompt tokens of the demo model; 0 leaves it out."""


FULL = Scale(LARGE, torch.bfloat16, ((1, 32768), (1, 131072), (2, 131072)), 20 << 30, 128, 48, 7000)
SMALL = Scale(TINY, torch.float32, ((1, 200), (4, 800)), 1 << 20, 40, 24, 0)


class SettledClock(Clock):
    """Notes when each token's logits are there, on the GPU too."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize(scores.device)
        return super().__call__(ids, scores)

    def after(self, settled: int) -> float:
        """Mean seconds per token from token `settled` on."""
        return (self.times[-1] - self.times[settled]) / (len(self.times) - 1 - settled)


def make_model(scale: Scale, device: str, longest: int) -> Any:
    """A random Llama, made on the device; greedy runs never stop early."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**scale.config, max_position_embeddings=longest, initializer_range=0.05)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=scale.dtype).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of KV that a token takes over all layers."""
    size = config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * size * dtype.itemsize)


def hindrance(side: str, needed: int, scale: Scale, device: str) -> str | None:
    """Why a side cannot run a case, if it cannot; vericache keeps full KV in host memory then."""
    if side == OFFLOADED:
        return None if device == "cuda" else "transformers offloads from an accelerator only"
    if needed <= scale.kv_budget or side == OURS:
        return None
    return f"its KV, {needed / 2**30:.2f} GiB, is over the budget of {scale.kv_budget / 2**30:.2f} GiB"


def run_side(model: Any, side: str, inputs: dict[str, torch.Tensor], scale: Scale, options: dict[str, Any]) -> Any:
    """({figures}, tokens) of one generate call."""
    torch._dynamo.reset()
    model._compiled_call_impl = None
    if side == OURS:
        model.compile(backend="vericache", options=options)
    more = {STATIC: {"cache_implementation": "static"}, OFFLOADED: {"cache_implementation": "offloaded"}}
    on_gpu = inputs["input_ids"].is_cuda
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    clock, began = SettledClock(), time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            **inputs, max_new_tokens=scale.new, do_sample=False, logits_processor=[clock], **more.get(side, {})
        )
    made: dict[str, Any] = {
        "ms_per_step": 1e3 * clock.after(scale.settled),
        "first_token_s": clock.times[0] - began,
        "wall_s": time.perf_counter() - began,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }
    if side == OURS:
        now = stats(model)
        spent = now["seconds"]["draft"] + now["seconds"]["verify"]
        made["rounds"] = per_round(None, now, inputs["input_ids"].shape[0])
        made["placement"] = now["placement"]
        made["round_ms"] = 1e3 * spent / now["rounds"]
    return made, out[:, inputs["input_ids"].shape[1] :].cpu()


def measure(
    model: Any, case: tuple[int, int], scale: Scale, device: str, arguments: argparse.Namespace, deadline: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(side, its figures or why there are none) of one case."""
    batch, tokens = case
    ids = torch.randint(1, scale.config["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
    needed = batch * (tokens + scale.new) * bytes_per_token(model.config, scale.dtype)
    reference: torch.Tensor | None = None
    longest = 0.0
    for side in SIDES:
        reason = hindrance(side, needed, scale, device)
        if reason is None and time.monotonic() + 1.5 * longest > deadline:
            reason = "the time was over"
        if reason is not None:
            yield side, {"not_run": reason}
            continue
        options = {"device_memory_mb": scale.kv_budget / 2**20, **arguments.options}
        try:
            made, out = run_side(model, side, inputs, scale, options)
        except torch.OutOfMemoryError as error:
            yield side, {"not_run": str(error).splitlines()[0]}
            continue
        finally:
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
        longest = max(longest, made["wall_s"])
        reference = out if reference is None else reference
        differs = (out != reference).any(0).nonzero().flatten().tolist()
        yield side, {**made, "differs_from_first_side_at": differs[0] if differs else None}


def acceptance(tokens: int, device: str, options: dict[str, Any]) -> dict[str, Any]:
    """Rounds of the demo model over a real text."""
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.bfloat16).to(device).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 2
    inputs = {name: x.to(device) for name, x in document(1, tokens).items()}
    model.compile(backend="vericache", options=options)
    model.generate(**inputs, max_new_tokens=128, do_sample=False)
    return {"model": "SmolLM2-135M-Instruct", "prompt_tokens": tokens, **per_round(None, stats(model), 1)}


def project(report: dict[str, Any]) -> None:
    """What a step would take if rounds gave as many tokens as the demo model's: random weights say nothing of it."""
    per = report["acceptance"].get("tokens_per_round")
    for case in report["cases"]:
        round_ms = case["sides"][OURS].get("round_ms")
        if per and round_ms:
            case["sides"][OURS]["ms_per_step_at_the_demo_models_acceptance"] = round_ms / per


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short prompts, on any device")
    parser.add_argument("--minutes", type=float, default=7.5, help="what would take longer is not run")
    parser.add_argument("--options", type=json.loads, default={"compressor": "snapkv", "keep": 0.2}, help="JSON")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    deadline = time.monotonic()
    arguments = parse_arguments()
    deadline += 60 * arguments.minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        print(json.dumps({"ran": False, "reason": f"no CUDA device; torch {torch.__version__} sees none"}))
        return
    scale = SMALL if arguments.tiny else FULL
    own = machine()
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        own |= {"device": found.name, "gpu_gib": found.total_memory / 2**30, "cuda": torch.version.cuda}
    report: dict[str, Any] = {
        "ran": True,
        "machine": own,
        "model": scale.config,
        "dtype": str(scale.dtype),
        "options": arguments.options,
        "kv_budget_gib": scale.kv_budget / 2**30,
        "acceptance": {},
        "cases": [],
    }
    if scale.acceptance_tokens:
        report["acceptance"] = acceptance(scale.acceptance_tokens, device, arguments.options)
    model = make_model(scale, device, max(tokens for _, tokens in scale.cases) + scale.new)
    for case in scale.cases:
        sides = {}
        for side, made in measure(model, case, scale, device, arguments, deadline):
            sides[side] = made
            print(case, side, made.get("not_run") or f"{made['ms_per_step']:.1f} ms per step", flush=True)
        report["cases"].append({"batch": case[0], "prompt_tokens": case[1], "sides": sides})
    project(report)
    write("gpu", report, arguments.out)


if __name__ == "__main__":
    main()
