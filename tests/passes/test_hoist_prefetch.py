"""Prefetches move as far ahead as the ring allows, and nothing else changes; no read comes before its wait."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from graphs import run_segmented, run_until, run_variant, take_steps, tiny_decode
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Graph

from vericache_compile.ops import ATTEND, PREFETCH, WAIT
from vericache_compile.passes.program import Program
from vericache_compile.plan import Act, SegmentedProgram, Staging

SITE_BYTES = 2 * (16 + 16) * 4
"""Of one token at one site of the tiny llama."""
COLUMNS = 64


def hoisted(slots: int, last: str = "hoist_prefetch") -> Program:
    staging = Staging(slots * COLUMNS * SITE_BYTES, COLUMNS)
    return run_until(tiny_decode("llama", 1), last, staging=staging)


def events(graph: Graph) -> list[str]:
    """Prefetches, waits and attentions of a graph in order, with their site."""
    place = {PREFETCH: ("prefetch", 1), WAIT: ("wait", 2), ATTEND: ("attend", 8)}
    found = ((place[node.target], node) for node in graph.nodes if node.target in place)
    return [f"{name} {node.args[at]}" for (name, at), node in found]


def steps_of(program: SegmentedProgram) -> list[str]:
    return [f"{step.act} {step.layer}" for step in program.steps if step.act is not Act.RUN]


def test_one_slot() -> None:
    program = hoisted(1)
    assert events(program.variants["draft"].graph) == ["prefetch 0", "attend 0", "attend 1", "attend 2"]
    assert events(program.variants["verify"].graph) == [
        *("prefetch 0", "wait 0", "wait 0", "attend 0", "prefetch 1"),
        *("wait 1", "wait 1", "attend 1", "prefetch 2", "wait 2", "wait 2", "attend 2"),
    ]


def test_two_slots() -> None:
    program = hoisted(2)
    assert events(program.variants["draft"].graph)[:2] == ["prefetch 0", "prefetch 1"]
    assert events(program.variants["verify"].graph) == [
        *("prefetch 0", "prefetch 1", "wait 0", "wait 0", "attend 0", "prefetch 2"),
        *("wait 1", "wait 1", "attend 1", "wait 2", "wait 2", "attend 2"),
    ]


def test_room_for_all_sites_and_for_none() -> None:
    everything, nothing = hoisted(9), hoisted(0)
    assert events(everything.variants["draft"].graph)[:3] == ["prefetch 0", "prefetch 1", "prefetch 2"]
    assert events(nothing.variants["verify"].graph) == events(hoisted(1).variants["verify"].graph)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_only_prefetches_move(slots: int) -> None:
    before = run_until(tiny_decode("llama", 1), "insert_transfers", staging=Staging(0, COLUMNS))
    after = hoisted(slots)
    for mode in ("draft", "verify"):
        ours, theirs = (
            [node.name for node in program.variants[mode].graph.nodes if node.target is not PREFETCH]
            for program in (after, before)
        )
        assert ours == theirs
    captured = tiny_decode("llama", 1)
    steps = take_steps(before, captured, 4)
    for mode, window in (("verify", 4), ("draft", 0)):
        for ours, theirs in zip(
            run_variant(after, mode, captured, steps, window),
            run_variant(before, mode, captured, steps, window),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


@settings(max_examples=12, deadline=None)
@given(nbytes=st.integers(0, 5 * COLUMNS * SITE_BYTES))
def test_no_read_before_its_wait_whatever_memory_there_is(nbytes: int) -> None:
    """On the graph: every attention is reached from both its waits, each from its prefetch, and slots suffice."""
    staging = Staging(nbytes, COLUMNS)
    program = run_until(tiny_decode("llama", 1), "hoist_prefetch", staging=staging)
    graph = program.variants["verify"].graph
    reach = nx.DiGraph([(read, node) for node in graph.nodes for read in node.all_input_nodes])
    order = {node: i for i, node in enumerate(graph.nodes)}
    sites = [node for node in graph.nodes if node.target is ATTEND]
    for layer, site in enumerate(sites):
        above = nx.ancestors(reach, site)
        waits = [node for node in above if node.target is WAIT and node.args[2] == layer]
        assert len(waits) == 2
        for wait in waits:
            [ticket] = (node for node in nx.ancestors(reach, wait) if node.target is PREFETCH)
            assert ticket.args[1] == layer
            assert order[ticket] < order[wait] < order[site]
    slots = staging.slots([nodes.site for nodes in program.sites], 1)
    asked = 0
    for node in graph.nodes:
        asked += node.target is PREFETCH
        done = sum(order[site] < order[node] for site in sites)
        assert asked - done <= slots


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_steps_keep_the_order(slots: int) -> None:
    program = hoisted(slots, "lower")
    assert steps_of(program.segmented["verify"]) == events(program.variants["verify"].graph)
    draft = steps_of(program.segmented["draft"])
    assert draft == [*(f"prefetch {layer}" for layer in range(slots)), "attend 0", "attend 1", "attend 2"]


def test_segments_are_those_of_a_program_without_transfers() -> None:
    plain = run_until(tiny_decode("llama", 1), "partition")
    ours = hoisted(2, "partition")
    for mode, segments in plain.segments.items():
        assert [segment.key for segment in ours.segments[mode]] == [segment.key for segment in segments]


def test_waits_bring_what_attention_reads() -> None:
    """The segmented program, with the cached inputs in place of transfers."""
    captured, program = tiny_decode("llama", 1), hoisted(2, "lower")
    steps = take_steps(program, captured, 4)
    plain = run_until(captured, "lower")
    for ours, theirs in zip(
        run_segmented(program, "verify", captured, steps, 4),
        run_segmented(plain, "verify", captured, steps, 4),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
