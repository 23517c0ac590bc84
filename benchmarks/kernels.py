"""How fast are the Triton kernels, against the bytes that they must move and against torch's own?

Prints a table and writes results/kernels-<machine>.json. Sizes are those of an 8B model in bfloat16 (32 query and 8 KV
heads of 128 channels). Launches are recorded as CUDA graphs over inputs that together are larger than the GPU's cache,
as they are when a model runs; medians of replays. The floor is bytes over the bandwidth of a copy, measured here.

Without a GPU it says so, and that is all.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from decode import machine, write
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from vericache_compile.compressors.spec import parse
from vericache_compile.kernels.draft_attention import draft_attention, region_lefts
from vericache_compile.kernels.interleave import count_before, interleave, interleave_reference
from vericache_compile.kernels.row_invariant_linear import row_invariant_linear
from vericache_compile.kernels.verify_attention import verify_attention
from vericache_compile.machine import measure

HEADS, KV_HEADS, SIZE, WINDOW = 32, 8, 128, 16
LENGTH = 32768
ROTATED = 200 << 20
"""Bytes that the inputs of one recording take at least."""
REPLAYS = 15
WEIGHTS = {"q, o": (4096, 4096), "gate, up": (14336, 4096), "down": (4096, 14336), "lm_head": (128256, 4096)}
METHODS = ("kivi(bits=2)", "kivi(bits=4)", "int8")

Run = Callable[[], object]


def median_us(runs: Sequence[Run]) -> float:
    """Microseconds of one run, of a recording of them all."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    times = []
    for _ in range(REPLAYS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(1e3 * began.elapsed_time(ended) / len(runs))
    return statistics.median(times[3:])


def draw(*shape: int) -> Tensor:
    """Random bfloat16 on the GPU."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def copies(nbytes: int) -> range:
    """As many as are needed to leave the cache behind."""
    return range(max(2, -(-ROTATED // nbytes)))


def attention_cases(batch: int, length: int, window: int) -> Iterator[tuple[str, int, dict[str, list[Run]]]]:
    """A window, or one drafted token, over dense keys and values."""
    starts = torch.full((batch,), length - window, device="cuda")
    lefts = torch.zeros((batch, KV_HEADS), dtype=torch.int64, device="cuda")
    q, nbytes = draw(batch, HEADS, window, SIZE), 4 * batch * KV_HEADS * length * SIZE
    caches = [(draw(batch, KV_HEADS, length, SIZE), draw(batch, KV_HEADS, length, SIZE)) for _ in copies(nbytes)]
    mask = torch.ones(window, length, dtype=torch.bool, device="cuda").tril(length - window)
    folded = q.reshape(batch, KV_HEADS, -1, SIZE)
    own = starts[0]
    flex = torch.compile(flex_attention, dynamic=False)
    blocks = create_block_mask(lambda b, h, i, j: j <= own + i, None, None, window, length, device="cuda")

    def ours(k: Tensor, v: Tensor) -> Run:
        attend = verify_attention if window > 1 else draft_attention
        return lambda: attend(q, k, v, starts, lefts, SIZE**-0.5)

    def sdpa(k: Tensor, v: Tensor) -> Run:
        if window == 1:
            return lambda: F.scaled_dot_product_attention(folded, k, v)
        return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def flexible(k: Tensor, v: Tensor) -> Run:
        return lambda: flex(q, k, v, block_mask=blocks, enable_gqa=True)

    name = "verify_attention" if window > 1 else "draft_attention, dense"
    sides = {"ours": ours, "scaled_dot_product_attention": sdpa, "FlexAttention": flexible}
    yield name, nbytes, {side: [made(*each) for each in caches] for side, made in sides.items()}


def packed_cases(length: int) -> Iterator[tuple[str, int, dict[str, list[Run]]]]:
    """One drafted token over a packed region and a short tail, against dequantising first."""
    q, tail = draw(1, HEADS, 1, SIZE), draw(1, KV_HEADS, 256, SIZE)
    newest = torch.tensor([127], device="cuda")
    for method in METHODS:
        region = parse(method, {}).compress(draw(KV_HEADS, length, SIZE), draw(KV_HEADS, length, SIZE), None)
        packed: Any = region.packed
        nbytes = sum(part.nbytes for side in packed for part in (side.codes, side.scale, side.zero) if part is not None)
        regions = [
            tuple(side._replace(codes=side.codes.clone(), scale=side.scale.clone()) for side in packed)
            for _ in copies(nbytes)
        ]
        lefts = torch.tensor(region_lefts(regions[:1], KV_HEADS), device="cuda")  # type: ignore[arg-type]

        covered = torch.tensor([region.covered], device="cuda")

        def ours(own: Any, lefts: Tensor = lefts, covered: Tensor = covered) -> Run:
            return lambda: draft_attention(q, tail, tail, newest, lefts, SIZE**-0.5, [own], covered)

        def dequantised(region: Any = region) -> Run:
            folded = q.reshape(1, KV_HEADS, -1, SIZE)
            return lambda: F.scaled_dot_product_attention(folded, *(side[None] for side in region.materialize()))

        runs = {"ours": [ours(own) for own in regions], "dequantised, then SDPA": [dequantised()] * 2}
        yield f"draft_attention, {method}", nbytes, runs


def linear_cases(rows: int) -> Iterator[tuple[str, int, dict[str, list[Run]]]]:
    """Rows by a weight."""
    for name, (outs, ins) in WEIGHTS.items():
        weights, x = [draw(outs, ins) for _ in copies(2 * outs * ins)], draw(rows, ins)

        def ours(weight: Tensor, x: Tensor = x) -> Run:
            return lambda: row_invariant_linear(x, weight, None)

        def library(weight: Tensor, x: Tensor = x) -> Run:
            return lambda: F.linear(x, weight)

        runs = {"ours": [ours(weight) for weight in weights], "cuBLAS": [library(weight) for weight in weights]}
        yield f"row_invariant_linear, {name}", 2 * outs * ins, runs


def interleave_cases(length: int) -> Iterator[tuple[str, int, dict[str, list[Run]]]]:
    """Keys and values of a site, a fifth of them kept, put into one in the order of the cache."""
    kept = length // 5
    held = torch.zeros((KV_HEADS, length), dtype=torch.bool, device="cuda")
    held.scatter_(1, torch.rand(KV_HEADS, length, device="cuda").argsort(dim=1)[:, :kept], True)
    before, firsts = count_before(held), torch.zeros((2, KV_HEADS, 1), dtype=torch.int64, device="cuda")
    nbytes = 2 * 2 * 2 * KV_HEADS * length * SIZE
    sides = [
        [[draw(KV_HEADS, count, SIZE) for _ in range(2)] for count in (length, kept, length - kept)]
        for _ in copies(nbytes)
    ]

    def ours(own: list[list[Tensor]]) -> Run:
        return lambda: interleave(*own, held, before, firsts)

    def operators(own: list[list[Tensor]]) -> Run:
        return lambda: interleave_reference(*own, held, firsts)

    yield "interleave", nbytes, {"ours": list(map(ours, sides)), "torch's operators": list(map(operators, sides))}


def cases() -> Iterator[tuple[str, str, int, dict[str, list[Run]]]]:
    """(kernel, size, bytes that must be moved, what is timed)."""
    for rows in (16, 64, 160):
        for name, nbytes, runs in linear_cases(rows):
            yield name, f"{rows} rows", nbytes, runs
    for batch in (1, 4):
        for length, window in ((LENGTH, WINDOW), (LENGTH // 5, 1)):
            for name, nbytes, runs in attention_cases(batch, length, window):
                yield name, f"{batch} x {length}", nbytes, runs
    for name, nbytes, runs in (*packed_cases(LENGTH), *interleave_cases(LENGTH)):
        yield name, f"1 x {LENGTH}", nbytes, runs


def markdown(report: dict[str, Any]) -> str:
    """The table of a report, as docs/gpu.md has it."""
    lines = ["| kernel | size | bytes / bandwidth, us | ours, us | torch's, us |", "|---|---|---|---|---|"]
    for case in report["cases"]:
        ours, *others = case["us"].items()
        theirs = ", ".join(f"{side} {us:.0f}" if us else f"{side} -" for side, us in others)
        lines.append(f"| `{case['kernel']}` | {case['size']} | {case['floor_us']:.0f} | {ours[1]:.0f} | {theirs} |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--markdown", type=Path, help="print the table of this JSON, and measure nothing")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(json.loads(arguments.markdown.read_text())))
        return
    if not torch.cuda.is_available():
        print(json.dumps({"ran": False, "reason": f"no CUDA device; torch {torch.__version__} sees none"}))
        return
    torch.manual_seed(0)
    bandwidth = measure(torch.device("cuda"))
    own = machine() | {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    report: dict[str, Any] = {"ran": True, "machine": own, "bandwidth": vars(bandwidth), "cases": []}
    for kernel, size, nbytes, sides in cases():
        us: dict[str, float | None] = {}
        for side, runs in sides.items():
            try:
                us[side] = median_us(runs)
            except RuntimeError as error:  # what torch cannot do for this size, or cannot record
                us[side] = None
                print(f"{kernel}, {size}, {side}: {str(error).splitlines()[0]}", flush=True)
        floor = nbytes / bandwidth.memory_gbps / 1e3
        report["cases"].append({"kernel": kernel, "size": size, "bytes": nbytes, "floor_us": floor, "us": us})
        write("kernels", report, arguments.out)
        print(kernel, size, f"floor {floor:.1f}", {side: us[side] and round(us[side], 1) for side in us}, flush=True)
    print(markdown(report))


if __name__ == "__main__":
    main()
