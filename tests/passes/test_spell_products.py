"""Products with weights are spelled for their variant; drafting may read copies of lower precision."""

from __future__ import annotations

import pytest
import torch
from graphs import Toy, calls_of, run_segmented, run_until, run_variant, take_steps, toy_decode

from vericache_compile.ops import LINEAR
from vericache_compile.passes.lower import lower
from vericache_compile.passes.partition import partition
from vericache_compile.passes.program import Program, placeholders
from vericache_compile.passes.spell_products import spell_products

PRODUCTS = {"mm", "addmm", "mul", "sum", "linear"}


def spelled(batch: int, *, inductor: bool, draft_dtype: torch.dtype | None = None) -> Program:
    """A toy program after the pass."""
    program = run_until(toy_decode(Toy(), batch=batch), "expand_window", batch=batch)
    assert spell_products(program, inductor=inductor, draft_dtype=draft_dtype) == 6
    return program


def products_of(program: Program, mode: str) -> list[str]:
    names = [name.split(".")[0] for name in calls_of(program.variants[mode])]
    return [name for name in names if name in PRODUCTS]


@pytest.mark.parametrize(
    ("batch", "inductor", "draft"),
    [
        (1, True, ["mul", "sum", "mul", "sum", "mul", "sum"]),
        (1, False, ["addmm", "mm", "addmm"]),
        (3, True, ["addmm", "mm", "addmm"]),
    ],
)
def test_one_row_is_a_reduction_and_many_rows_are_a_gemm(batch: int, inductor: bool, draft: list[str]) -> None:
    program = spelled(batch, inductor=inductor)
    assert products_of(program, "draft") == draft
    assert products_of(program, "verify") == ["addmm", "mm", "addmm"]


def test_spelling_again_finds_nothing() -> None:
    program = spelled(1, inductor=True)
    assert spell_products(program, inductor=True, draft_dtype=None) == 0


@pytest.mark.parametrize("draft_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("batch", "inductor"), [(1, True), (1, False), (3, True)])
def test_verify_reads_the_models_own_weights(batch: int, inductor: bool, draft_dtype: torch.dtype | None) -> None:
    program = spelled(batch, inductor=inductor, draft_dtype=draft_dtype)
    assert all(node.meta.get("cast") is None for node in placeholders(program.variants["verify"]))
    assert not any(node.target is LINEAR for v in program.variants.values() for node in v.graph.nodes)
    captured = toy_decode(Toy(), batch=batch)
    steps = take_steps(program, captured, 4)
    [logits] = run_variant(program, "verify", captured, steps, 4)
    torch.testing.assert_close(logits, torch.stack([rows[0] for rows in steps.rows]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("batch", "inductor"), [(1, True), (3, False)])
def test_draft_reads_copies_of_the_draft_type(batch: int, inductor: bool) -> None:
    program = spelled(batch, inductor=inductor, draft_dtype=torch.bfloat16)
    partition(program)
    lower(program, inductor=False)
    assert {dtype for *_, dtype in program.segmented["verify"].weights} == {None}
    cast = [i for _, i, dtype in program.segmented["draft"].weights if dtype is torch.bfloat16]
    names = [program.placeholders[i].name for i in cast]
    assert len(names) == 3
    assert all("weight" in name and "embed" not in name for name in names)
    captured = toy_decode(Toy(), batch=batch)
    steps = take_steps(program, captured, 1)
    [token] = run_segmented(program, "draft", captured, steps, 0)
    assert torch.equal(token, steps.rows[0][0].argmax(-1)), "the toy's margins are wider than bfloat16's error"
