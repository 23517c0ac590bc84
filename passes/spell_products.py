"""Spell every product with a weight in aten, in the form that suits its variant.

    verify, eager, many rows     vericache.linear(x, w, b)  ->  view, mm or addmm, view
    draft with one row           vericache.linear(x, w, b)  ->  (w * x).sum(-1) + b

One row makes a matrix-vector product: bound by the weight's bytes, it is fastest as a reduction that Inductor fuses
with its neighbours. Drafting needs no exact weights, so with a `draft_dtype` it reads copies of that type (verify
always reads the model's own); the runtime makes the copies once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from vericache_compile.ops import LINEAR
from vericache_compile.passes.program import Program

aten = torch.ops.aten
VIEWS = (aten.t.default, aten.permute.default, aten.transpose.int, aten.alias.default)


def spell_products(program: Program, *, inductor: bool, draft_dtype: torch.dtype | None) -> int:
    """Rewrite all `vericache.linear` nodes of both variants; returns how many there were."""
    count = 0
    for mode, module in program.variants.items():
        cast = draft_dtype if mode == "draft" else None
        low: dict[Node, Node] = {}
        for node in list(module.graph.find_nodes(op="call_function", target=LINEAR)):
            one_row = mode == "draft" and inductor and node.args[0].meta["val"].shape[:-1].numel() == 1
            _Spelling(module.graph, node, low, cast).rewrite(one_row)
            count += 1
        module.graph.eliminate_dead_code()
        module.recompile()
    return count


class _Spelling:
    """Rewrites one product; every node it makes carries a fake value and the product's source line."""

    def __init__(self, graph: Graph, node: Node, low: dict[Node, Node], cast: torch.dtype | None) -> None:
        self.graph, self.node, self.low, self.cast = graph, node, low, cast

    def rewrite(self, one_row: bool) -> None:
        """Replace the product by its spelling."""
        x, weight, bias = self.node.args
        assert isinstance(x, Node) and isinstance(weight, Node), "a product of tensors"
        own = self.node.meta["val"]
        with self.graph.inserting_before(self.node):
            weight = self._lowered(weight)
            made = self._reduction(x, weight, bias, own) if one_row else self._gemm(x, weight, bias, own)
        self.node.replace_all_uses_with(made)
        self.graph.erase_node(self.node)

    def _reduction(self, x: Node, weight: Node, bias: Any, own: torch.Tensor) -> Node:
        row = self.call(aten.view.default, x, [1, x.meta["val"].shape[-1]])
        product = self.call(aten.mul.Tensor, self._as(weight, own.dtype), row)
        total = self.call(aten.sum.dim_IntList, product, [-1])
        if bias is not None:
            total = self.call(aten.add.Tensor, total, bias)
        return self.call(aten.view.default, total, list(own.shape))

    def _gemm(self, x: Node, weight: Node, bias: Any, own: torch.Tensor) -> Node:
        size = x.meta["val"].shape[-1]
        rows = self.call(aten.reshape.default, self._as(x, weight.meta["val"].dtype), [-1, size])
        turned = self.call(aten.permute.default, weight, [1, 0])
        if bias is None or weight.meta["val"].dtype != own.dtype:
            out = self._as(self.call(aten.mm.default, rows, turned), own.dtype)
            out = out if bias is None else self.call(aten.add.Tensor, out, bias)
        else:
            out = self.call(aten.addmm.default, bias, rows, turned)
        return self.call(aten.view.default, out, list(own.shape))

    def _as(self, value: Node, dtype: torch.dtype) -> Node:
        if value.meta["val"].dtype == dtype:
            return value
        return self.call(torch.ops.prims.convert_element_type.default, value, dtype)

    def _lowered(self, weight: Node) -> Node:
        """The weight as an input of the draft type; what is not a (view of a) larger weight stays as it is."""
        if self.cast is None or weight.meta["val"].dtype.itemsize <= self.cast.itemsize:
            return weight
        if weight in self.low:
            return self.low[weight]
        if weight.op == "placeholder" and weight.meta.get("captured_input") is not None:
            with self.graph.inserting_after(weight):
                made = self.graph.placeholder(f"{weight.name}_draft")
            made.meta.update(weight.meta)
            with weight.meta["val"].fake_mode:
                made.meta["val"] = torch.empty_like(weight.meta["val"], dtype=self.cast)
            made.meta["cast"] = self.cast
        elif weight.target in VIEWS:
            source = self._lowered(weight.all_input_nodes[0])
            with self.graph.inserting_after(source if source.op != "placeholder" else _last_placeholder(self.graph)):
                made = self.call(weight.target, source, *weight.args[1:])
        else:
            return weight
        self.low[weight] = made
        return made

    def call(self, target: Callable[..., Any], *args: Any) -> Node:
        """A call node with its fake value."""
        made = self.graph.call_function(target, args)
        made.meta["stack_trace"] = self.node.meta.get("stack_trace")
        with self.node.meta["val"].fake_mode, torch.no_grad():
            made.meta["val"] = target(*(a.meta["val"] if isinstance(a, Node) else a for a in args))
        return made


def _last_placeholder(graph: Graph) -> Node:
    last: Node = list(graph.find_nodes(op="placeholder", sort=True))[-1]
    return last
