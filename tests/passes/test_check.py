"""Every invariant that `check` holds can be broken, and then it says where."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from graphs import Toy, run_until, toy_decode

from vericache_compile.ops import ATTEND
from vericache_compile.passes.check import check
from vericache_compile.passes.expand_window import find_gemms
from vericache_compile.passes.program import Program, output_node


@pytest.fixture
def program_after() -> object:
    """A legal program after a pass."""
    return lambda last: run_until(toy_decode(Toy()), last)


@pytest.mark.parametrize("last", ["split_captured", "split_modes", "expand_window", "partition", "lower"])
def test_a_legal_program_passes(program_after: object, last: str) -> None:
    check(program_after(last), last)


def test_a_graph_that_returns_nothing(program_after: object) -> None:
    program = program_after("split_captured")
    output_node(program.captured).args = ((),)
    with pytest.raises(AssertionError, match="after some_pass: captured returns nothing"):
        check(program, "some_pass")


def test_a_graph_out_of_order(program_after: object) -> None:
    program = program_after("split_modes")
    graph = program.variants["draft"].graph
    attend = next(node for node in graph.nodes if node.target is ATTEND)
    output_node(program.variants["draft"]).append(attend)
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        check(program, "some_pass")


def test_a_missing_site(program_after: object) -> None:
    program: Program = program_after("expand_window")
    graph = program.variants["verify"].graph
    attend = next(node for node in graph.nodes if node.target is ATTEND)
    attend.replace_all_uses_with(attend.args[0])
    graph.erase_node(attend)
    with pytest.raises(AssertionError, match=r"after some_pass: verify attends at layers \[\]"):
        check(program, "some_pass")


def test_products_that_differ_in_number(program_after: object) -> None:
    program: Program = program_after("expand_window")
    gemm = find_gemms(program.variants["verify"])[-1]
    with program.variants["verify"].graph.inserting_after(gemm):
        copy = program.variants["verify"].graph.node_copy(gemm)
    gemm.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)
    with pytest.raises(AssertionError, match="3 GEMMs in draft, 4 in verify"):
        check(program, "expand_window")


def test_an_expanded_weight(program_after: object) -> None:
    program: Program = program_after("expand_window")
    gemm = find_gemms(program.variants["verify"])[0]
    weight = gemm.args[1]
    weight.meta["val"] = torch.empty(32, 1).expand(32, 32)
    with pytest.raises(AssertionError, match=f"{gemm.name} reads an operand that is expanded"):
        check(program, "expand_window")


def test_a_missing_segment(program_after: object) -> None:
    program: Program = program_after("partition")
    program.segments["draft"].pop()
    with pytest.raises(AssertionError, match="draft has 1 segments, expected 2"):
        check(program, "partition")


def test_a_segment_that_attends(program_after: object) -> None:
    program: Program = program_after("partition")
    segment = program.segments["verify"][1]
    program.segments["verify"][1] = replace(segment, module=program.variants["verify"])
    with pytest.raises(AssertionError, match=r"segment 1 of verify holds \['attend'\]"):
        check(program, "partition")


def test_a_slot_that_is_read_before_it_is_filled(program_after: object) -> None:
    program: Program = program_after("lower")
    segmented = program.segmented["draft"]
    program.segmented["draft"] = replace(segmented, steps=segmented.steps[1:])
    with pytest.raises(AssertionError, match=r"step 0 of draft reads slots \[.*\], which hold nothing"):
        check(program, "lower")


def test_a_slot_that_is_freed_before_it_is_returned(program_after: object) -> None:
    program: Program = program_after("lower")
    segmented = program.segmented["draft"]
    last = replace(segmented.steps[-1], dead=segmented.outputs)
    program.segmented["draft"] = replace(segmented, steps=(*segmented.steps[:-1], last))
    with pytest.raises(AssertionError, match=r"draft returns slots \[.*\], which hold nothing"):
        check(program, "lower")
