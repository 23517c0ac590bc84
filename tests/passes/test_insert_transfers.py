"""Verify waits for each site's full KV before it attends; the graph gives the same rows."""

from __future__ import annotations

import pytest
import torch
from graphs import Captured, Toy, run_until, run_variant, take_steps, tiny_decode, toy_decode
from torch.fx import Node

from vericache_compile.ops import ATTEND, PREFETCH, WAIT
from vericache_compile.passes.check import check
from vericache_compile.plan import Staging

STAGING = Staging(0, 64)
DECODES = {
    "toy": lambda: toy_decode(Toy()),
    "llama": lambda: tiny_decode("llama", 1),
}


@pytest.fixture(params=DECODES)
def captured(request: pytest.FixtureRequest) -> Captured:
    """A decode step of one site, and one of three."""
    return DECODES[request.param]()


def test_before_and_after() -> None:
    before = run_until(toy_decode(Toy()), "spell_products").variants["verify"]
    after = run_until(toy_decode(Toy()), "insert_transfers", staging=STAGING).variants["verify"]
    new = [node for node in after.graph.nodes if node.target in (PREFETCH, WAIT)]
    [attention] = (node for node in after.graph.nodes if node.target is ATTEND)
    ticket, keys, values = new
    assert [node.target for node in new] == [PREFETCH, WAIT, WAIT]
    assert attention.args[3:5] == (keys, values)
    assert (keys.args[1], values.args[1]) == (ticket, ticket)
    [plain] = (node for node in before.graph.nodes if node.target is ATTEND)
    assert [node.args[0].name for node in (keys, values)] == [node.name for node in plain.args[3:5]]
    rest = [node.name for node in after.graph.nodes if node not in new]
    assert rest == [node.name for node in before.graph.nodes]


def test_the_graph_gives_the_same_rows(captured: Captured) -> None:
    before = run_until(captured, "spell_products")
    after = run_until(captured, "insert_transfers", staging=STAGING)
    steps = take_steps(before, captured, 4)
    for ours, theirs in zip(
        run_variant(after, "verify", captured, steps, 4),
        run_variant(before, "verify", captured, steps, 4),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_draft_is_left_alone(captured: Captured) -> None:
    draft = run_until(captured, "insert_transfers", staging=STAGING).variants["draft"]
    assert not [node for node in draft.graph.nodes if node.target in (PREFETCH, WAIT)]


def test_where_full_kv_is_on_the_device_there_are_none(captured: Captured) -> None:
    verify = run_until(captured, "partition").variants["verify"]
    assert not [node for node in verify.graph.nodes if node.target in (PREFETCH, WAIT)]


@pytest.mark.parametrize("fault", ["no wait", "another site's ticket", "out of order"])
def test_an_illegal_graph_is_refused(fault: str) -> None:
    program = run_until(tiny_decode("llama", 1), "insert_transfers", staging=STAGING)
    graph = program.variants["verify"].graph
    sites = [node for node in graph.nodes if node.target is ATTEND]
    tickets = [node for node in graph.nodes if node.target is PREFETCH]
    if fault == "no wait":
        held = sites[0].args[3]
        assert isinstance(held, Node)
        sites[0].update_arg(3, held.args[0])
    elif fault == "another site's ticket":
        held = sites[1].args[4]
        assert isinstance(held, Node)
        held.update_arg(1, tickets[0])
    else:
        tickets[0].prepend(tickets[1])
    with pytest.raises(AssertionError, match="after insert_transfers"):
        check(program, "insert_transfers")
