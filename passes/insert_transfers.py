"""Bring each site's full KV in before verify attends to it: correct wherever the cache lies, and not yet early.

Before, in verify                                  After
    attend(q, k, v, past_k, past_v, lengths, ...)      ticket = prefetch(lengths, layer)
                                                       keys = wait(past_k, ticket, layer)
                                                       values = wait(past_v, ticket, layer)
                                                       attend(q, k, v, keys, values, lengths, ...)

Order is carried by data: attention reads what `wait` returns, `wait` reads the ticket. Draft attends to the compressed
cache, which is on the device, so it gets none.
"""

from __future__ import annotations

from torch.fx import Node

from vericache_compile.ops import ATTEND, LAYER, PREFETCH, WAIT
from vericache_compile.passes.program import Program


def insert_transfers(program: Program) -> int:
    """Give each site of verify a prefetch and two waits; returns the number of sites that got them."""
    variant = program.variants["verify"]
    sites = [node for node in variant.graph.nodes if node.target is ATTEND]
    for attention in sites:
        _insert(attention)
    variant.recompile()
    return len(sites)


def _insert(attention: Node) -> None:
    keys, values, lengths, layer = attention.args[3], attention.args[4], attention.args[5], attention.args[LAYER]
    assert isinstance(lengths, Node), f"{attention.name} has no lengths"
    with attention.graph.inserting_before(attention):
        ticket = attention.graph.call_function(PREFETCH, (lengths, layer))
        ticket.meta["val"] = lengths.meta["val"].new_empty((1,))
        for place, past in ((3, keys), (4, values)):
            assert isinstance(past, Node), f"{attention.name} has no cache"
            held = attention.graph.call_function(WAIT, (past, ticket, layer))
            held.meta["val"] = past.meta["val"]
            attention.update_arg(place, held)
    for node in (ticket, *attention.args[3:5]):
        assert isinstance(node, Node), "just made"
        node.meta["stack_trace"] = attention.meta.get("stack_trace")
