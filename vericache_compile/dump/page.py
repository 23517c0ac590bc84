"""index.html: the graphs after each pass, in one file that opens from disk and loads nothing.

The layout is computed here, segment by segment; the template's script draws only the rows that a person opens. It is
a script of our own, not a graph library: a decoder is layer after layer, so there is nothing to lay out that needs one.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from torch.fx import GraphModule, Node

from vericache_compile.dump.describe import KINDS, SITES, describe_node, describe_segments, graphs_of, segment_of
from vericache_compile.passes.program import Program

BOX = (210, 36)
"""Width and height of a node, in pixels."""
STEP = (222, 50)
"""From a node to the next one."""


@dataclass
class Page:
    """What index.html shows, gathered pass by pass as plain values; equal nodes are kept once."""

    stages: list[dict[str, Any]] = field(default_factory=list)
    nodes: dict[str, int] = field(default_factory=dict)
    """Nodes as JSON rows, each with its number."""
    sources: dict[str, int] = field(default_factory=lambda: {"": 0})

    def add(self, name: str, count: int, program: Program) -> None:
        """Take down the graphs as they are after a pass."""
        graphs = {graph: list(self._groups(program, graph, module)) for graph, module in graphs_of(program).items()}
        self.stages.append({"name": name, "count": count, "graphs": graphs})

    def html(self, title: str, refusal: str = "") -> str:
        """The page; every name in it is data, never markup."""
        data: dict[str, Any] = {"box": BOX, "refusal": refusal, "sources": list(self.sources), "stages": self.stages}
        text = f'{json.dumps(data, separators=(",", ":"))[:-1]},"nodes":[{",".join(self.nodes)}]}}'
        template = files("vericache_compile.dump").joinpath("page.html").read_text(encoding="utf-8")
        return template.replace("@TITLE@", html.escape(title)).replace("@DATA@", text.replace("<", "\\u003c"))

    def _groups(self, program: Program, graph: str, module: GraphModule) -> Iterator[dict[str, Any]]:
        """The rows of a graph: inputs, then segments and sites in turn, then what is returned."""
        origins = [node.name for node in program.placeholders]
        segments = describe_segments(program, graph)
        for kind, label, nodes in rows_of(module):
            places, size = lay_out(nodes, in_a_column=kind == "inputs")
            drawn = [[self._number(node, origins), *place] for node, place in zip(nodes, places, strict=True)]
            group: dict[str, Any] = {"kind": kind, "label": label, "nodes": drawn, "size": size}
            if kind == "segment" and segments:
                known = segments[int(label.removeprefix("segment "))]
                group |= {"key": known["key"], "shared": 1 + len(known["shared_with"])}
            yield group

    def _number(self, node: Node, origins: list[str]) -> int:
        known = describe_node(node)
        traced, captured = known["traced_from"], known.get("captured_input")
        if captured is not None and node.op == "placeholder" and node.name != origins[captured]:
            traced = [origins[captured]]
        source = self.sources.setdefault(known["source"], len(self.sources))
        texts = [known[name] for name in ("name", "op", "target", "type", "args")]
        row = json.dumps([*texts, source, known["inputs"], traced, KINDS.get(node.target, "")], separators=(",", ":"))
        return self.nodes.setdefault(row, len(self.nodes))


def rows_of(module: GraphModule) -> Iterator[tuple[str, str, list[Node]]]:
    """(kind, label, nodes) of each row of a graph, top to bottom."""
    segments: dict[int, list[Node]] = {}
    sites: dict[int, Node] = {}
    for node, segment in segment_of(module.graph).items():
        if node.target in SITES:
            sites[segment - 1] = node
        elif node.op not in ("placeholder", "output"):
            segments.setdefault(segment, []).append(node)
    yield "inputs", "inputs", [node for node in module.graph.nodes if node.op == "placeholder"]
    for i in range(len(sites) + 1):
        yield "segment", f"segment {i}", segments.get(i, [])
        if i in sites:
            yield "site", f"attention of layer {i}", [sites[i]]
    yield "output", "output", [node for node in module.graph.nodes if node.op == "output"]


def lay_out(nodes: list[Node], in_a_column: bool) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Where each node of a row goes, and the size of them all: below what it reads, beside others as deep."""
    depth = _depths(nodes)
    taken: dict[int, int] = {}
    places = []
    for i, node in enumerate(nodes):
        down = i if in_a_column else depth[node]
        across = taken.get(down, 0)
        taken[down] = across + 1
        places.append((across * STEP[0], down * STEP[1]))
    size = tuple(max((place[axis] for place in places), default=0) + BOX[axis] for axis in (0, 1))
    return places, (size[0], size[1])


def _depths(nodes: list[Node]) -> dict[Node, int]:
    """The longest way from the top of the row; what reads nothing in it stands right above its first reader."""
    depth: dict[Node, int] = {}
    for node in nodes:
        depth[node] = max((1 + depth[read] for read in node.all_input_nodes if read in depth), default=0)
    for node in nodes:
        readers = [depth[user] for user in node.users if user in depth]
        if readers and not any(read in depth for read in node.all_input_nodes):
            depth[node] = max(0, min(readers) - 1)
    return depth
