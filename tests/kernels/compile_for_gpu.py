"""Compile the Triton programs for a GPU that need not be here: python compile_for_gpu.py 90 bf16 128.

Takes the compute capability, the type and the head size; prints {program: bytes of shared memory}. Arguments are typed
as a launch on aligned tensors types them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vericache_compile.kernels import (
    draft_attention_triton,
    interleave_triton,
    row_invariant_linear_triton,
    verify_attention_triton,
    write_token_triton,
)
from vericache_compile.kernels.draft_attention import region_tile
from vericache_compile.kernels.interleave import BLOCK, CHUNK
from vericache_compile.kernels.row_invariant_linear import Tiles, tiles_of
from vericache_compile.kernels.verify_attention import PART, SPLIT, tile_sizes

PARTS = {"outs", "tops", "totals"}
NUMBERS = {"places", "l_batch", "l_head", "kv_heads", "splits", "skipped", "tokens", "room", "end", "rows", "blocks"}
HEADS = ("to_k_", "to_v_", "kept_k_", "kept_v_", "left_k_", "left_v_")
WIDTHS = {"bf16": 2, "fp16": 2, "fp32": 4}


def kind_of(name: str, dtype: str) -> str:
    """The type of an argument."""
    if name in NUMBERS or name.startswith(("q_", "k_", "v_", "x_", "w_", "new_", *HEADS)):
        return "i32"
    if name == "scale":
        return "fp32"
    if name.endswith("_codes"):
        return "*u8"
    if name in ("starts", "lefts", "slots", "firsts", "covered"):
        return "*i64"
    if name in ("held", "before"):
        return "*i1" if name == "held" else "*i32"
    return "*fp32" if name in PARTS else f"*{dtype}"


def compile_program(
    function: Any, capability: int, dtype: str, warps: int, stages: int, constants: dict[str, Any]
) -> int:
    """Bytes of shared memory that the compiled program takes."""
    kinds = {name: "constexpr" if name in constants else kind_of(name, dtype) for name in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(kinds.items())
        if kind.startswith("*") or (kind == "i32" and name not in NUMBERS)
    }
    source = ASTSource(function, kinds, constants, aligned)
    made = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": warps, "num_stages": stages})
    return int(made.metadata.shared)


def main(capability: int, dtype: str, size: int) -> dict[str, int]:
    """All programs as a model of 8 query heads, 2 KV heads and a window of 16 launches them."""
    width = WIDTHS[dtype]
    rows, tile, deep = tile_sizes(64, size * width)
    both = {"GROUP": 4, "VALUE": size, "SPLIT": SPLIT, "PAD_E": size}
    merged = {"GROUP": 4, "VALUE": size, "SPLIT": SPLIT, "PART": PART}
    own = {"SIZE": size, "PAD_D": size, "SOFT_CAP": 0.0}
    (few, stages), (many, _) = (region_tile(bits, size * width) for bits in (4, 8))
    region = {**both, **own, "ROWS": 16, "WHOLE": True}
    kivi = {"TILE": few, "BITS": 4, "ZERO": True, "PACKED": 32, "KEY_CHANNELS": 0, "VALUE_CHANNELS": 32}
    int8 = {"TILE": many, "BITS": 8, "ZERO": False, "PACKED": 1, "KEY_CHANNELS": 32, "VALUE_CHANNELS": 32}
    odd = {"SIZE": size - 16, "VALUE": size - 16, "KEY_CHANNELS": 16, "VALUE_CHANNELS": 16, "WHOLE": False}
    products = {outs: tiles_of(outs, width) for outs in (4096, 14336)}
    window = {"WINDOW": 16, "REACH": 0}
    biased = {"BIAS": True, "RELATIVE": True}
    own_order = [each.name for each in verify_attention_triton.merge_splits.params if each.do_not_specialize]
    assert own_order == ["splits"], "what divides the number of splits would decide in which order sums are made"
    verify, draft = verify_attention_triton, draft_attention_triton
    return {
        name: compile_program(function, capability, dtype, warps, depth, constants)
        for name, function, warps, depth, constants in (
            (
                "attend_splits",
                verify.attend_splits,
                4,
                deep,
                {**both, **own, **window, **biased, "ROWS": rows, "TILE": tile},
            ),
            ("merge_splits", verify.merge_splits, 1, 3, {**merged, **window, "SINKS": True}),
            ("attend_region, kivi", draft.attend_region, 2, stages, {**region, **kivi}),
            (
                "attend_region, kivi, odd sizes",
                draft.attend_region,
                2,
                stages,
                {**region, **kivi, **odd, "KEY_CHANNELS": 0},
            ),
            ("attend_region, int8", draft.attend_region, 2, stages, {**region, **int8}),
            ("attend_region, int8, odd sizes", draft.attend_region, 2, stages, {**region, **int8, **odd}),
            (
                "interleave",
                interleave_triton.interleave,
                4,
                3,
                {"SIZE": size, "VALUE": size, "BLOCK": BLOCK, "CHUNK": CHUNK},
            ),
            ("write_token", write_token_triton.write_token, 4, 3, {"SIZE": size, "VALUE": size, "PAD": size}),
            *(
                (
                    f"multiply, {outs} outputs",
                    row_invariant_linear_triton.multiply,
                    4,
                    tiles.stages,
                    inner(outs, tiles, width),
                )
                for outs, tiles in products.items()
            ),
        )
    }


def inner(outs: int, tiles: Tiles, width: int) -> dict[str, Any]:
    """Constants of a product with a weight [outs, 4096]."""
    shape = {"HEADS": 1, "IN": 4096, "OUT": outs, "BIAS": True, "w_column": 1}
    return shape | {"ROWS": tiles.rows, "OUTS": tiles.outs, "INS": tiles.width // width}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
