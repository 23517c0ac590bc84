"""Find where a token's position comes from, so that a window of tokens can be given one position each.

Before: positions are an input, or integers computed from the past length or from the padding mask (arange(1) + past).
After: `program.position_nodes` are the nodes to replace by a positions tensor [B, 1], and `program.position_rule` says
how the runtime fills it: given (the caller's input), column (the column in the cache) or unpadded (column minus left
padding). A computed position is recognised by its value in several scenes, not by its spelling. Where a batch has one
position [1] for all its rows, `program.in_step` says that they can only advance together.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vericache_compile.passes.evaluate import Scene, batch_symbols, evaluate, least_room, reads_data, scenes
from vericache_compile.passes.program import (
    Program,
    ancestors,
    changed,
    example,
    mutates,
    output_node,
    target_name,
    unsupported,
)

MOVES = {"view", "reshape", "to", "contiguous", "long", "int", "squeeze", "unsqueeze", "expand", "getitem"}
"""Calls that leave a position's value as it is."""


def lift_positions(program: Program) -> int:
    """Set the position rule, nodes and limit; returns the number of nodes to replace. Raises UnsupportedGraph."""
    roles = program.found_roles
    integers = _integers(program, _length_nodes(program))
    frontier = _frontier(program, integers)
    if roles.positions is not None:
        if frontier:
            raise unsupported(
                "a value computed from the past length beside given positions", frontier[0], "pass positions in one way"
            )
        program.position_nodes = [program.placeholders[roles.positions]]
    else:
        program.position_rule, program.position_nodes = _common_rule(program, frontier, integers)
    program.in_step = program.batch > 1 and any(example(node).dim() < 2 for node in program.position_nodes)
    program.position_limit = _position_limit(program)
    return len(program.position_nodes)


def _length_nodes(program: Program) -> set[Node]:
    """Nodes that depend on the past length or the padding mask, and on nothing else that varies."""
    cached, batch = program.cached, batch_symbols(program)
    mask = program.found_roles.mask
    padding = program.placeholders[mask] if mask is not None else None
    unmoved = {*program.writes, *program.idle}
    counters = [program.placeholders[i] for i in program.found_roles.counters]
    lengths: set[Node] = set()
    other: set[Node] = set()
    for node in program.module.graph.nodes:
        if node.op == "placeholder":
            value = example(node)
            is_length = isinstance(value, torch.SymInt) and value.node.expr not in batch
            if is_length or node is padding or node in counters:
                lengths.add(node)
            elif isinstance(value, Tensor):
                other.add(node)
        elif reads_data(node, cached) or any(i in other - cached for i in node.all_input_nodes):
            other.add(node)
        elif any(i in lengths or i in cached for i in node.all_input_nodes):
            lengths.add(node)
        if mutates(node) and changed(node) not in other and node not in unmoved:
            raise unsupported("an in-place change of a mask or position", node, "write it out of place")
    return lengths


def _frontier(program: Program, integers: set[Node]) -> list[Node]:
    """Integer tensors that depend on lengths alone and are read, not only by a mask, as something else."""
    masks = set(ancestors([side for nodes in program.sites for side in nodes.sides]))
    written = [node for nodes in program.sites for node in (nodes.key, nodes.value)]
    live = set(ancestors([output_node(program.module), *written])) - masks - set(program.writes)
    live_users = {node: [user for user in node.users if user in live] for node in integers}
    return [
        node
        for node in program.module.graph.nodes
        if node in integers and any(user not in integers for user in live_users[node])
    ]


def _integers(program: Program, lengths: set[Node]) -> set[Node]:
    """Integer tensors that are computed from lengths alone, or are the past length as the caller sets it."""
    inputs, roles = program.placeholders, program.found_roles
    given = {inputs[i] for i in roles.counters if i not in roles.counted}
    computed = {node for node in lengths if node.op != "placeholder"} | given
    return {node for node in computed if getattr(example(node), "dtype", None) in (torch.int64, torch.int32)}


def _common_rule(program: Program, frontier: list[Node], integers: set[Node]) -> tuple[str, list[Node]]:
    """The rule that one set of position nodes follows, and these nodes: all of the frontier is computed from them."""
    candidates = [node for node in dict.fromkeys(ancestors(frontier)) if node in integers]
    held = scenes(program, frontier)
    values = [evaluate(program, candidates, scene) for scene in held]
    lost = frontier
    for rule in ("column", "unpadded"):
        rows = zip(candidates, zip(*values, strict=True), strict=True)
        follows = {n for n, row in rows if all(map(_follows, row, held, [rule] * len(held)))}
        cuts = {node: _cut(node, follows, set(candidates)) for node in frontier}
        lost = [node for node, cut in cuts.items() if cut is None]
        if not lost:
            return rule, list(dict.fromkeys(node for cut in cuts.values() for node in cut or ()))
    raise unsupported("a value computed from the past length that is not a position", lost[0], "pass position_ids")


def _cut(node: Node, follows: set[Node], candidates: set[Node]) -> list[Node] | None:
    """The nodes nearest to `node` that hold positions and separate it from the past length; best those of rank 2."""
    if node in follows and example(node).dim() == 2:
        return [node]
    sources = [i for i in node.all_input_nodes if i in candidates]
    if sources and len(sources) == len(node.all_input_nodes):
        cuts = [_cut(i, follows, candidates) for i in sources]
        if all(cut is not None for cut in cuts):
            return [found for cut in cuts for found in cut or ()]
    return [node] if node in follows else None


def _follows(value: Tensor, scene: Scene, rule: str) -> bool:
    """Whether a value is the new token's position in each row of a scene: [B or 1, 1, ...], or one for a batch of 1."""
    pads = torch.tensor(scene.pads)
    expected = scene.past - (pads if rule == "unpadded" else torch.zeros_like(pads))
    if value.dim() < 2 and len(pads) > 1 and rule != "column":
        return False
    flat = value.reshape(value.shape[0], -1) if value.dim() > 1 else value.reshape(1, -1)
    return flat.shape[1] == 1 and torch.equal(flat.expand(len(pads), 1)[:, 0].cpu(), expected)


def _position_limit(program: Program) -> int | None:
    """Rows of the tables that positions index, less the offset at which they index them; where positions are columns
    of a buffer, no more than these."""
    limits = [rows - offset for start in program.position_nodes for rows, offset in _tables(start)]
    if program.writes and program.position_rule != "given" and (room := least_room(program)) is not None:
        limits.append(room)
    return min(limits, default=None)


def _tables(node: Node, offset: int = 0) -> Iterator[tuple[int, int]]:
    """Rows of each table that a position indexes, and what was added to it before; through changes of shape."""
    for user in node.users:
        added = [a for a in user.args if isinstance(a, int)]
        if (table := _indexed(user, node)) is not None:
            yield from ((rows, offset) for rows in table if isinstance(rows, int))
        elif target_name(user) in MOVES:
            yield from _tables(user, offset)
        elif user.target in (operator.add, torch.add, "add") and len(added) == 1:
            yield from _tables(user, offset + added[0])


def _indexed(call: Node, index: Node) -> tuple[Any, ...] | None:
    """Along the axis that `index` chooses from, the size of the tensor that a call takes entries of; None for a call
    that does nothing of that kind."""
    name, (first, *rest) = target_name(call), call.args or (None,)
    if name == "embedding" and first is index:
        return _size(rest[0], 0)
    if name == "index_select" and index in rest:
        return _size(first, rest[0])
    if name == "getitem" and first is not index:
        places = rest[0] if isinstance(rest[0], (list, tuple)) else (rest[0],)
        if index not in places or Ellipsis in places:
            return ()
        return _size(first, sum(place is not None for place in places[: places.index(index)]))
    return None


def _size(table: Any, dim: Any) -> tuple[Any, ...]:
    return (example(table).shape[dim],) if isinstance(table, Node) else ()
