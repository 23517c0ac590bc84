"""Products with weights are spelled for their variant; drafting may read copies of lower precision."""

from __future__ import annotations

import pytest
import torch
from graphs import Toy, calls_of, run_segmented, run_until, run_variant, take_steps, toy_decode

from vericache_compile import ops
from vericache_compile.passes.lower import lower
from vericache_compile.passes.partition import partition
from vericache_compile.passes.program import Program, placeholders
from vericache_compile.passes.spell_products import spell_products

PRODUCTS = {"mm", "addmm", "mul", "sum", "linear", "int8_linear"}


def spelled(batch: int, *, inductor: bool, draft_dtype: torch.dtype | None = None, window: int = 4) -> Program:
    """A toy program after the pass."""
    program = run_until(toy_decode(Toy(), batch=batch), "expand_window", batch=batch, window=window)
    spell_products(program, inductor=inductor, draft_dtype=draft_dtype)
    return program


def products_of(program: Program, mode: str) -> list[str]:
    names = [name.split(".")[0] for name in calls_of(program.variants[mode])]
    return [name for name in names if name in PRODUCTS]


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that neither oneDNN nor a kernel of ours serves."""
    monkeypatch.setattr(ops, "is_row_invariant", lambda weight: False)
    monkeypatch.setattr(ops, "has_onednn", lambda weight: False)
    monkeypatch.setattr("vericache_compile.passes.spell_products.has_onednn", lambda weight: False)


@pytest.mark.parametrize(("batch", "inductor"), [(1, True), (8, True), (9, True), (1, False)])
def test_few_rows_are_reductions_and_many_rows_are_a_gemm(batch: int, inductor: bool) -> None:
    program = spelled(batch, inductor=inductor)
    reductions = [*["mul"] * batch, *["sum"] * batch]
    found = products_of(program, "draft")
    assert sorted(found) == (sorted(reductions * 3) if inductor and batch <= 8 else ["linear"] * 3)
    assert products_of(program, "verify") == ["linear"] * 3


@pytest.mark.parametrize(("batch", "inductor"), [(1, True), (16, False), (17, False)])
def test_the_same_rows_go_through_int8_copies_at_once(batch: int, inductor: bool) -> None:
    program = spelled(batch, inductor=inductor, draft_dtype=torch.int8)
    found = products_of(program, "draft")
    if batch > 16:
        assert "int8_linear" not in found
        return
    assert found == ["int8_linear"] * 2
    outs = [
        node.args[3] for node in program.variants["draft"].graph.find_nodes(op="call_function", target=ops.INT8_LINEAR)
    ]
    assert sorted(map(len, outs)) == [1, 2]


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize(("batch", "window", "padded"), [(1, 2, 0), (1, 4, 0), (3, 2, 3), (3, 4, 0), (5, 2, 3)])
def test_without_a_kernel_rows_are_padded_to_multiples_of_four(batch: int, window: int, padded: int) -> None:
    program = spelled(batch, inductor=False, window=window)
    assert products_of(program, "draft") == ["addmm", "mm", "addmm"]
    assert products_of(program, "verify") == ["addmm", "mm", "addmm"]
    calls = calls_of(program.variants["verify"])
    assert sum(name.startswith("constant_pad_nd") for name in calls) == padded
    captured = toy_decode(Toy(), batch=batch)
    steps = take_steps(program, captured, window)
    [logits] = run_variant(program, "verify", captured, steps, window)
    torch.testing.assert_close(logits, torch.stack([rows[0] for rows in steps.rows]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("draft_dtype", [None, torch.bfloat16, torch.int8])
def test_spelling_again_finds_nothing(draft_dtype: torch.dtype | None) -> None:
    program = spelled(1, inductor=True, draft_dtype=draft_dtype)
    assert spell_products(program, inductor=True, draft_dtype=draft_dtype) == 0


@pytest.mark.parametrize("draft_dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("batch", "inductor"), [(1, True), (1, False), (3, True)])
def test_verify_reads_the_models_own_weights(batch: int, inductor: bool, draft_dtype: torch.dtype | None) -> None:
    program = spelled(batch, inductor=inductor, draft_dtype=draft_dtype)
    assert all(node.meta.get("cast") is None for node in placeholders(program.variants["verify"]))
    captured = toy_decode(Toy(), batch=batch)
    steps = take_steps(program, captured, 4)
    [logits] = run_variant(program, "verify", captured, steps, 4)
    torch.testing.assert_close(logits, torch.stack([rows[0] for rows in steps.rows]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("batch", "inductor", "draft_dtype", "read_as"),
    [
        (1, True, torch.bfloat16, torch.bfloat16),
        (3, False, torch.bfloat16, torch.bfloat16),
        (1, True, torch.int8, torch.int8),
        (3, True, torch.int8, torch.int8),
        (3, False, torch.int8, torch.int8),
        (17, True, torch.int8, torch.bfloat16),
    ],
)
def test_draft_reads_copies_of_the_draft_type(
    batch: int,
    inductor: bool,
    draft_dtype: torch.dtype,
    read_as: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as anywhere:  # what is spelled where oneDNN takes bfloat16 runs elsewhere as well
        anywhere.setattr("vericache_compile.passes.spell_products.multiplies_bfloat16", lambda: True)
        program = spelled(batch, inductor=inductor, draft_dtype=draft_dtype)
    partition(program)
    lower(program, inductor=False)
    assert {cast for *_, cast in program.segmented["verify"].weights} == {None}
    read = [i for _, i, cast in program.segmented["draft"].weights if cast is not None and cast.dtype is read_as]
    names = [program.placeholders[i].name for i in read]
    assert len(names) == 3 * (2 if read_as is torch.int8 else 1)
    assert all("weight" in name and "embed" not in name for name in names)
    captured = toy_decode(Toy(), batch=batch)
    steps = take_steps(program, captured, 1)
    [token] = run_segmented(program, "draft", captured, steps, 0)
    assert torch.equal(token, steps.rows[0][0].argmax(-1)), "the toy's margins are wider than the copies' error"
