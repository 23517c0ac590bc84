"""Ask for full KV as early as the ring allows; moves only.

A ring of n slots, each for one site's full KV, lets a prefetch be n sites ahead of its wait. With 2 slots for 4 sites:

Before, in verify                                  After, in verify
    s0 | prefetch 0, wait 0, attend 0                  prefetch 0, prefetch 1
    s1 | prefetch 1, wait 1, attend 1                  s0 | wait 0, attend 0, prefetch 2
    s2 | prefetch 2, wait 2, attend 2                  s1 | wait 1, attend 1, prefetch 3
    s3 | prefetch 3, wait 3, attend 3                  s2 | wait 2, attend 2
                                                       s3 | wait 3, attend 3

What reaches the top of verify goes on into the draft step that runs before it: draft then begins with prefetch 0 and
prefetch 1. Verify keeps its own, which find the transfer under way, so that it is whole by itself.

That is for sites that come whole, and for the columns that there were when the graph was captured. When it runs, a
request that finds no room in the ring waits for it, and one that finds room for more begins the transfers of the next
sites too (`runtime/incoming.py`): the order of use is the order of the sites.
"""

from __future__ import annotations

from vericache_compile.ops import ATTEND, PREFETCH
from vericache_compile.passes.program import Program, placeholders
from vericache_compile.plan import Staging


def hoist_prefetch(program: Program, *, staging: Staging) -> int:
    """Move each prefetch as many sites ahead as there are slots, the first ones into draft; returns how many moved."""
    lookahead = staging.slots([nodes.site for nodes in program.sites], program.batch)
    verify, draft = program.variants["verify"], program.variants["draft"]
    sites = [node for node in verify.graph.nodes if node.target is ATTEND]
    tickets = [node for node in verify.graph.nodes if node.target is PREFETCH]
    first = next(node for node in verify.graph.nodes if node.op != "placeholder" and node not in tickets)
    for layer, ticket in enumerate(tickets):
        if layer < lookahead:
            first.prepend(ticket)
        else:
            sites[layer - lookahead].append(ticket)
    [lengths] = (node for node in placeholders(draft) if node.meta["role"] == "lengths")
    first = next(node for node in draft.graph.nodes if node.op != "placeholder")
    with draft.graph.inserting_before(first):
        for ticket in tickets[:lookahead]:
            early = draft.graph.call_function(PREFETCH, (lengths, ticket.args[1]))
            early.meta.update(ticket.meta)
    verify.recompile()
    draft.recompile()
    return len(tickets)
