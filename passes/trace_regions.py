"""Bring a graph to aten one region at a time, and equal regions once: a model of equal layers costs what a few cost.

    r0 | attend 0, r1 | attend 1, r2 | ... | attend L-1, rL      regions, in the graph's own order
    traced: r0, one of the equal regions, rL                     each of the others is a copy of its like

Regions are equal where their calls, arguments, constants and source lines are, and the layout of what they read and
which of it has a window. A graph with something between regions that no cut may separate is one region.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from vericache_compile.ops import ATTEND, LAYER
from vericache_compile.passes.partition import cut_out, structure_key
from vericache_compile.passes.program import make_module, mutates, placeholders, returned, target_name

aten = torch.ops.aten
Run = Callable[..., Any]


@dataclass(frozen=True)
class _Traced:
    module: GraphModule
    """Takes the tensors that a region reads; returns what it hands on, flat."""
    spec: TreeSpec
    mapped: list[bool]
    """Which of what it returns has a window."""


def trace_regions(
    module: GraphModule, inputs: Mapping[Node, Any], mapped: Collection[Node], run: Callable[[GraphModule], Run]
) -> GraphModule:
    """The aten graph of `module` on fake `inputs`, of which those in `mapped` have a window.

    A window is a leading axis [W, ...] that torch.func.vmap maps over; where any input has one, all that is returned
    has it. `run` makes of a region what is called to run it.
    """
    regions = list(_regions(module.graph))
    whole = [node for region in regions for node in region]
    unrolled = _Unrolled(module, inputs, mapped, run)
    if any(map(_enters, regions)) or not all(map(unrolled.add, regions)):
        unrolled = _Unrolled(module, inputs, mapped, run)
        unrolled.add(whole)
    return unrolled.finish()


def _regions(graph: Graph) -> Iterator[list[Node]]:
    region: list[Node] = []
    for node in graph.nodes:
        if node.target is ATTEND:
            yield region
            region = []
        if node.op not in ("placeholder", "output"):
            region.append(node)
    yield region


def _enters(region: Sequence[Node]) -> bool:
    """Whether a region enters what a later one leaves (autocast, say)."""
    inside = set(region)
    return any("enter" in target_name(node) and not inside.issuperset(node.users) for node in region)


class _Unrolled:
    """The aten graph as it grows, region by region."""

    def __init__(
        self,
        module: GraphModule,
        inputs: Mapping[Node, Any],
        mapped: Collection[Node],
        run: Callable[[GraphModule], Run],
    ) -> None:
        self.module, self.run = module, run
        self.root, self.graph = torch.nn.Module(), Graph()
        self.value: dict[Node, Any] = {}
        """What stands for a value of `module`: nodes of `graph`, and constants, also within tuples and the like."""
        self.mapped: set[Node] = set()
        """Nodes of `graph` that have a window."""
        self.traced: dict[str, _Traced] = {}
        self.constants = count()
        self.is_pure = not any(mutates(node) for node in module.graph.nodes)
        for node, given in inputs.items():
            made = self.graph.placeholder(node.name)
            made.meta["val"] = given
            self._hold(node, made if isinstance(given, Tensor) else given)
            if node in mapped:
                self.mapped.add(made)

    def add(self, nodes: Sequence[Node]) -> bool:
        """Append a region; whether it leaves what it reads as it is."""
        inside = set(nodes)
        outputs = [node for node in nodes if not inside.issuperset(node.users)]
        region, reads = cut_out(self.module, nodes, outputs)
        layers = [node.args[LAYER] for node in nodes if node.target is ATTEND]
        for site in region.graph.find_nodes(op="call_function", target=ATTEND):
            site.update_arg(LAYER, 0)
        leaves, spec = tree_flatten([self.value[node] for node in reads])
        tensors = [leaf for leaf in leaves if isinstance(leaf, Node)]
        key = self._key(region, tensors)
        if key not in self.traced:
            self.traced[key] = self._trace(region, leaves, spec)
        like = self.traced[key]
        made = self._copy(like.module, tensors, layers)
        self.mapped.update(leaf for leaf, is_mapped in zip(made, like.mapped, strict=True) if is_mapped)
        for node, value in zip(outputs, tree_unflatten(made, like.spec), strict=True):
            self._hold(node, value)
        return all(node.target is not aten.copy_.default for node in like.module.graph.nodes)

    def finish(self) -> GraphModule:
        """The graph, returning what `module` returns."""
        self.graph.output(tuple(self._with_window(self.value[node]) for node in returned(self.module)))
        return make_module(self.root, self.graph)

    def _hold(self, node: Node, value: Any) -> None:
        self.value[node] = value
        node.meta["val"] = tree_map_only(Node, lambda made: made.meta["val"], value)

    def _key(self, region: GraphModule, tensors: Sequence[Node]) -> str:
        traces = [str(node.meta.get("stack_trace")) for node in region.graph.nodes]
        lines = [structure_key(region), *(str(node in self.mapped) for node in tensors), *traces]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _trace(self, region: GraphModule, leaves: Sequence[Any], spec: TreeSpec) -> _Traced:
        """make_fx of a region that is given `leaves`, of which only the tensors vary."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Node)]
        in_dims = tuple(0 if node in self.mapped else None for node in tensors)
        run, specs, mapped = self.run(region), list[TreeSpec](), list[bool]()

        def flat(*given: Tensor) -> list[Any]:
            rest = iter(given)
            filled = [next(rest) if isinstance(leaf, Node) else leaf for leaf in leaves]
            values, spec_out = tree_flatten(run(*tree_unflatten(filled, spec)))
            specs.append(spec_out)
            mapped.extend(isinstance(x, Tensor) and torch._C._functorch.is_batchedtensor(x) for x in values)
            return values

        def windowed(*given: Tensor) -> list[Any]:
            if not self.mapped.intersection(tensors):
                return flat(*given)
            values: list[Any] = []

            def rows(*given: Tensor) -> tuple[Tensor, ...]:
                values.extend(flat(*given))
                return tuple(value for value, is_mapped in zip(values, mapped, strict=True) if is_mapped)

            made = iter(torch.func.vmap(rows, in_dims=in_dims)(*given))
            return [next(made) if is_mapped else value for value, is_mapped in zip(values, mapped, strict=True)]

        call = windowed if self.is_pure else torch.func.functionalize(windowed)
        fakes = [node.meta["val"].detach() for node in tensors]  # make_fx takes one tensor given twice for one input
        traced = make_fx(call, decomposition_table=select_decomp_table())(*fakes)
        return _Traced(traced, specs[0], mapped)

    def _copy(self, traced: GraphModule, tensors: Sequence[Node], layers: Sequence[Any]) -> list[Any]:
        """Append a traced region that reads `tensors`; returns what it hands on, flat."""
        node_of = dict(zip(placeholders(traced), tensors, strict=True))
        numbers = iter(layers)
        for node in traced.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            made = node_of[node] = self.graph.node_copy(node, node_of.__getitem__)
            if node.target is ATTEND:
                made.update_arg(LAYER, next(numbers))
            if node.op == "get_attr":
                made.target = f"_constant_{next(self.constants)}"
                setattr(self.root, made.target, getattr(traced, str(node.target)))
        return list(map_arg(returned(traced), node_of.__getitem__))

    def _with_window(self, node: Node) -> Node:
        """A value that is the same for all tokens of the window, once for each."""
        if not self.mapped or node in self.mapped:
            return node
        window = next(iter(self.mapped)).meta["val"].shape[0]
        made = self.graph.call_function(aten.expand.default, (node, [window, *node.meta["val"].shape]))
        made.meta["val"] = node.meta["val"].expand(made.args[1])
        return made
