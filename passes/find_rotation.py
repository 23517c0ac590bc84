"""Find how each site's keys are rotated by position (RoPE), as a program of its own: x before, position -> x after.

    k = x * cos(p) + rotate_half(x) * sin(p)      ->      rotation(x [B, K, 1, D], p [B, 1], inv_freq, ...)

A method of compression may ask for keys as they were before (`pre_rope`). Structure decides, not names: going back from
the key, the first single value from which, with positions, all of it is computed. A key to which no position is mixed
between its projection and the cache has no rotation. Nothing in the graph changes; what is found moves no token of the
output, so a rotation that cannot be cut out is one that is not known, and never refuses a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from vericache_compile.errors import UnsupportedGraph
from vericache_compile.passes.evaluate import bind_symbols, concrete
from vericache_compile.passes.program import Program, example, is_weight, make_module
from vericache_compile.plan import Rope


def find_rotation(program: Program) -> int:
    """Set `program.rotations`, one per site (None where there is none); returns how many sites have one."""
    fed = _reached(program, [program.placeholders[program.found_roles.tokens], *program.cached])
    placed = _reached(program, program.position_nodes)
    shared: dict[tuple[str, tuple[int, ...]], Rope] = {}
    program.rotations = []
    for nodes in program.sites:
        before = _before_rotation(nodes.key, fed, placed)
        rope = _cut_out(program, nodes.key, before, fed) if before is not None else None
        if rope is not None:  # layers that rotate alike share one
            rope = shared.setdefault((_text(rope.module), rope.weights), rope)
        program.rotations.append(rope)
    return sum(rope is not None for rope in program.rotations)


def _reached(program: Program, sources: list[Node]) -> set[Node]:
    """The given nodes and all that depends on them."""
    reached = set(sources)
    for node in program.module.graph.nodes:
        if any(i in reached for i in node.all_input_nodes):
            reached.add(node)
    return reached


def _before_rotation(key: Node, fed: set[Node], placed: set[Node]) -> Node | None:
    """The nearest node from which `key` is computed with positions alone; None where positions do not come in."""
    order = {node: i for i, node in enumerate(key.graph.nodes)}
    front, mixed = {key}, False
    while front:
        if len(front) == 1 and mixed and all(isinstance(example(node), Tensor) for node in front):
            return front.pop()
        last = max(front, key=order.__getitem__)
        front.remove(last)
        if any(is_weight(i) for i in last.all_input_nodes) or last.op == "placeholder":
            return None  # its projection, or a norm: what lies before is the layer's input
        mixed |= any(i in placed and i not in fed for i in last.all_input_nodes)
        front |= {i for i in last.all_input_nodes if i in fed}
    return None


def _cut_out(program: Program, key: Node, before: Node, fed: set[Node]) -> Rope | None:
    """The graph from `before` and positions to `key`; None where it needs anything else."""
    given, env = example(before), bind_symbols(program, 1)
    if not isinstance(given, Tensor):  # the parts of a split
        return None
    sizes = [sorted(concrete(size, env) for size in value.shape) for value in (given, example(key))]
    if sizes[0] != sizes[1] or given.shape[-1] != example(key).shape[-1]:
        return None
    graph, copies, weights = Graph(), dict[Node, Node | int](), list[int]()
    x, positions = graph.placeholder("x"), graph.placeholder("positions")
    shape = [concrete(size, env) for size in given.shape]
    try:
        needed = _between(program, key, before)
        for node in program.module.graph.nodes:
            if node not in needed or node.op == "output":
                continue
            if node is before:
                copies[node] = graph.call_method("reshape", (x, shape))
            elif node in program.position_nodes:
                copies[node] = _as(graph, positions, node, program.batch)
            elif isinstance(example(node), torch.SymInt):
                copies[node] = concrete(example(node), env)
            elif node.op == "placeholder":
                weights.append(_weight(program, node))
                copies[node] = graph.placeholder(f"weight_{len(weights)}")
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
    except UnsupportedGraph:
        return None
    graph.output(copies[key])
    _inputs_first(graph)
    return Rope(make_module(program.module, graph), tuple(weights))


def _between(program: Program, key: Node, before: Node) -> set[Node]:
    """What `key` is computed from, no further back than `before` and the positions."""
    ends = {before, *program.position_nodes}
    needed, stack = set[Node](), [key]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += [] if node in ends else node.all_input_nodes
    return needed


def _weight(program: Program, node: Node) -> int:
    """The index of an input that is a weight; raises UnsupportedGraph for any other."""
    if not is_weight(node):
        raise UnsupportedGraph("a rotation by something other than positions", node.name, "none")
    return program.placeholders.index(node)


def _as(graph: Graph, positions: Node, node: Node, batch: int) -> Node:
    """Positions [B, 1] in the rank of the node that they stand for."""
    rank = example(node).dim()
    if rank == 2:
        return positions
    if rank < 2 and batch > 1:
        raise UnsupportedGraph("one position for all rows of a batch", node.name, "none")
    return graph.call_method("reshape", (positions, (1,) * rank if rank < 2 else (batch, *(1,) * (rank - 1))))


def _text(module: GraphModule) -> str:
    """Operators and arguments without the names of nodes."""
    number = {node: i for i, node in enumerate(module.graph.nodes)}
    calls = [(node.op, str(node.target) if node.op != "placeholder" else "", node.args, node.kwargs) for node in number]
    return str(torch.fx.node.map_arg(calls, lambda node: f"%{number[node]}"))


def _inputs_first(graph: Graph) -> None:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(iter(graph.nodes))
    for node in inputs[1:]:
        first.append(node)
        first = node
