"""GraphML and DOT: the FX graph, node for node and edge for edge."""

from __future__ import annotations

import io
from typing import Any

import networkx
import pytest
from graphs import run_until, tiny_decode
from torch.fx import Graph

from vericache_compile.dump.graph_files import dot, graphml
from vericache_compile.passes.program import Program


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def program(request: Any) -> Program:
    return run_until(tiny_decode(request.param, 1), "lower")


@pytest.mark.parametrize("mode", ["draft", "verify"])
def test_graphml_read_back_is_the_fx_graph(program: Program, mode: str) -> None:
    graph = program.variants[mode].graph
    read = networkx.read_graphml(io.BytesIO(graphml(graph).encode()))
    nodes = list(graph.nodes)
    assert set(read.nodes) == {node.name for node in nodes}
    assert set(read.edges) == {(used.name, node.name) for node in nodes for used in node.all_input_nodes}
    attends = [data for _, data in read.nodes(data=True) if data["kind"] == "site"]
    assert {data["target"] for data in attends} == {"vericache.attend.default"}
    assert {data["segment"] for _, data in read.nodes(data=True)} == {0, 1, 2, 3}


def test_dot_has_every_node_and_edge(program: Program) -> None:
    graph = program.variants["draft"].graph
    lines = dot(graph).splitlines()
    edges = [line for line in lines if " -> " in line]
    assert len(edges) == sum(len(node.all_input_nodes) for node in graph.nodes)
    assert sum("[label=" in line for line in lines) == len(graph.nodes)


def test_hostile_names_are_escaped() -> None:
    graph = Graph()
    made = graph.call_method('"];\n\\evil\x0c<&>', (graph.placeholder("x"),))
    made.meta["stack_trace"] = '  File "a\x0c.py", line 1, in forward\n    y = "]]>"\n'
    graph.output(made)
    read = networkx.read_graphml(io.BytesIO(graphml(graph).encode()))
    assert read.nodes[made.name]["target"] == '."];\n\\evil\N{REPLACEMENT CHARACTER}<&>'
    [line] = [line for line in dot(graph).split("\n") if "evil" in line and "->" not in line]
    assert '\\"];\\n\\\\evil' in line
