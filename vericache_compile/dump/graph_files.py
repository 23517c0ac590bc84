"""A variant for other programs to read: GraphML (networkx), and DOT in a few lines of our own."""

from __future__ import annotations

import re
from typing import Any

from torch.fx import Graph

from vericache_compile.dump.describe import KINDS, describe_node, segment_of

NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, however it is escaped; a form feed in a source line, say."""
COLOURS = {"site": "#f4b183", "prefetch": "#c6e5b3", "wait": "#f7e08b", "placeholder": "#d9d9d9", "output": "#d9d9d9"}


def to_networkx(graph: Graph) -> Any:
    """A networkx.DiGraph with a node per FX node, by name, and an edge from each value to each of its readers."""
    import networkx

    made = networkx.DiGraph()
    for node, segment in segment_of(graph).items():
        known = describe_node(node)
        texts = {name: _clean(known[name]) for name in ("op", "target", "type", "args", "source")}
        made.add_node(node.name, **texts, segment=segment, kind=KINDS.get(node.target, ""))
        made.add_edges_from((read, node.name) for read in known["inputs"])
    return made


def _clean(text: str) -> str:
    return NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def graphml(graph: Graph) -> str:
    """GraphML that `networkx.read_graphml` reads back."""
    import networkx

    return "\n".join(networkx.generate_graphml(to_networkx(graph))) + "\n"


def dot(graph: Graph) -> str:
    """Graphviz's DOT, a cluster per segment."""
    clusters: dict[int, list[str]] = {}
    edges = []
    for node, segment in segment_of(graph).items():
        known = describe_node(node)
        colour = COLOURS.get(KINDS.get(node.target, node.op), "#ffffff")
        label = _quote("\n".join((known["name"], known["target"], known["type"])))
        line = f"    {_quote(node.name)} [label={label}, fillcolor={_quote(colour)}];"
        clusters.setdefault(segment, []).append(line)
        edges += [f"  {_quote(read)} -> {_quote(node.name)};" for read in known["inputs"]]
    lines = ["digraph program {", "  node [shape=box, style=filled];"]
    for segment, nodes in sorted(clusters.items()):
        lines += [f"  subgraph cluster_{segment} {{", f'    label="segment {segment}";', *nodes, "  }"]
    return "\n".join([*lines, *edges, "}"]) + "\n"


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
