"""Cut a variant at its attention sites into segments, and find which segments are the same program.

    s0 | attend 0 | s1 | attend 1 | ... | sL      s1 ... s(L-1) of a decoder differ only in their inputs: one artefact

Prefetches and waits stand between segments as well; a prefetch keeps its place in the graph.

A node goes to the segment after the last attention it depends on; what depends on weights alone is repeated in each
segment that reads it. Inputs are numbered in the order of first use, so that equal layers get equal keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_map_only

from vericache_compile.ops import ATTEND, OUTSIDE
from vericache_compile.passes.program import Program, SegmentGraph, make_module, placeholders


def partition(program: Program) -> int:
    """Fill `program.segments[mode]`; returns the number of distinct segments over all variants."""
    for mode, variant in program.variants.items():
        program.segments[mode] = cut(variant)
    return len({segment.key for segments in program.segments.values() for segment in segments})


def cut(variant: GraphModule) -> list[SegmentGraph]:
    """Segments of a variant in order; attention i runs between segments i and i + 1. A segment may be empty."""
    level = levels(variant.graph)
    free = _weight_only(variant)
    sites = sum(node.target is ATTEND for node in variant.graph.nodes)
    members: list[list[Node]] = [[] for _ in range(sites + 1)]
    for node in variant.graph.nodes:
        if node.op in ("call_function", "get_attr") and node.target not in OUTSIDE and node not in free:
            members[level[node]].append(node)
    return [_segment(variant, nodes, [n for n in nodes if _is_needed(n, level)], free) for nodes in members]


def levels(graph: Graph, sites: Collection[Any] = (ATTEND,)) -> dict[Node, int]:
    """For each node the number of the segment in which all that it reads is there; `sites` are attention's targets."""
    level: dict[Node, int] = {}
    seen = 0
    for node in graph.nodes:
        is_site = node.target in sites
        seen += is_site
        placed = is_site or node.target in OUTSIDE
        level[node] = seen if placed else max((level[i] for i in node.all_input_nodes), default=0)
    return level


def _weight_only(variant: GraphModule) -> set[Node]:
    """Computed nodes that depend on weights and constants alone, and that only segments read."""
    free: set[Node] = set()
    for node in variant.graph.nodes:
        known = (i in free or (i.op == "placeholder" and not i.meta.get("role")) for i in node.all_input_nodes)
        inside = node.op in ("call_function", "get_attr") and node.target not in OUTSIDE
        if inside and not any(map(_is_seam, node.users)) and all(known):
            free.add(node)
    return free


def _is_seam(node: Node) -> bool:
    """Whether a node reads values from outside of any segment."""
    return node.op == "output" or node.target in OUTSIDE


def _is_needed(node: Node, level: dict[Node, int]) -> bool:
    """Whether a node is read by an attention, by a later segment, or returned."""
    return any(_is_seam(user) or level[user] != level[node] for user in node.users)


def _segment(variant: GraphModule, nodes: list[Node], outputs: list[Node], free: set[Node]) -> SegmentGraph:
    module, inputs = cut_out(variant, nodes, outputs, free)
    return SegmentGraph(module, tuple(inputs), tuple(outputs), structure_key(module))


def cut_out(
    variant: GraphModule, nodes: Sequence[Node], outputs: Sequence[Node], free: Collection[Node] = ()
) -> tuple[GraphModule, list[Node]]:
    """Nodes of a graph as a graph that returns `outputs`, with those in `free` repeated; and what it takes, in the
    order of first use."""
    graph = Graph()
    node_of: dict[Node, Node] = {}
    inputs: list[Node] = []

    def bring(node: Node) -> Node:
        if node not in node_of:
            if node in free:
                node_of[node] = graph.node_copy(node, bring)
            else:
                inputs.append(node)
                node_of[node] = _placeholder(graph, node, len(inputs))
        return node_of[node]

    for node in nodes:
        node_of[node] = graph.node_copy(node, bring)
    graph.output(tuple(node_of[n] for n in outputs))
    _placeholders_first(graph)
    return make_module(variant, graph), inputs


def _placeholder(graph: Graph, node: Node, number: int) -> Node:
    made = graph.placeholder(f"in_{number}")
    made.meta["val"] = node.meta["val"]
    return made


def _placeholders_first(graph: Graph) -> None:
    """Placeholders in order of creation, before all other nodes."""
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        if node.op == "placeholder":
            first.prepend(node)


def structure_key(module: GraphModule) -> str:
    """A digest of operators, arguments, shapes, strides, types and devices: equal keys run the same program."""
    number = {node: i for i, node in enumerate(module.graph.nodes)}
    lines = [_describe(node.meta["val"]) for node in placeholders(module)]
    for node in module.graph.nodes:
        args = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
        lines.append(f"{node.op} {node.target if node.op.startswith('call_') else ''} {args}")
        if node.op == "get_attr":
            lines.append(_describe_constant(getattr(module, str(node.target))))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _describe(value: object) -> str:
    """A tensor by its layout, also within a tuple or the like; any other value by itself."""

    def layout(tensor: torch.Tensor) -> str:
        return f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.device}"

    return str(tree_map_only(torch.Tensor, layout, value))


def _describe_constant(value: object) -> str:
    """A constant tensor by its bytes, a nested graph by its code and constants, anything else by which object it is."""
    if isinstance(value, torch.Tensor):
        with unset_fake_temporarily():
            held = value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{_describe(value)} {hashlib.sha256(held).hexdigest()}"
    if isinstance(value, GraphModule):
        inner = (getattr(value, str(node.target)) for node in value.graph.find_nodes(op="get_attr"))
        return "\n".join([value.code, *map(_describe_constant, inner)])
    return f"{type(value).__name__} {id(value)}"
