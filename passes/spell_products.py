"""Spell every product with a weight in aten, in the form that suits its variant.

    verify, eager, many rows     vericache.linear(x, w, b)  ->  stays (oneDNN), or view, mm or addmm, view
    draft with one row           vericache.linear(x, w, b)  ->  (w * x).sum(-1) + b

Verify's bits must not depend on where in a window a token stands. The operator keeps to that where oneDNN takes the
weight. Other libraries were seen to for 2 rows and for multiples of 4, and not for 5, 6, 9 or 10: there, row counts
are padded.

One row makes a matrix-vector product: bound by the weight's bytes, it is fastest as a reduction that Inductor fuses
with its neighbours. Drafting needs no exact weights, so with a `draft_dtype` it reads copies of that type (verify
always reads the model's own); the runtime makes the copies once. An int8 copy is codes and one scale per output:

    (w * x).sum(-1)  ->  (codes * x).sum(-1) * scale               one row
    mm(x, w)         ->  vericache.linear_int8(x, codes, scale)    many rows
                         mm(x, codes) * scale                      where torch has no int8 GEMM
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from vericache_compile.ops import LINEAR, LINEAR_INT8, has_int8_gemm, has_onednn
from vericache_compile.passes.program import Program
from vericache_compile.plan import Cast

aten = torch.ops.aten
TURNS = (aten.t.default, aten.permute.default, aten.transpose.int)
"""Views that swap the axes of a matrix; views that change nothing were dropped when the variant was traced."""
ROWS = 4
"""Row counts above 2 are padded to a multiple of this in verify."""

Lowered = tuple[Node, Node | None]
"""A weight as draft reads it, and its scales [out] where it is int8."""


def spell_products(program: Program, *, inductor: bool, draft_dtype: torch.dtype | None) -> int:
    """Rewrite the `vericache.linear` nodes of both variants that have to change; returns how many."""
    count = 0
    for mode, module in program.variants.items():
        low: dict[tuple[Node, int], Lowered] = {}
        for node in list(module.graph.find_nodes(op="call_function", target=LINEAR)):
            spelling = _Spelling(module.graph, node, low, draft_dtype if mode == "draft" else None)
            one_row = node.args[0].meta["val"].shape[:-1].numel() == 1
            if mode == "draft" and inductor and one_row:
                spelling.rewrite(spelling.reduction)
            elif spelling.is_exact and has_onednn(node.args[1].meta["val"]):
                continue
            else:
                spelling.rewrite(spelling.gemm if mode == "draft" else spelling.padded_gemm)
            count += 1
        module.graph.eliminate_dead_code()
        module.recompile()
    return count


class _Spelling:
    """Rewrites one product; every node it makes carries a fake value and the product's source line."""

    def __init__(
        self, graph: Graph, node: Node, low: dict[tuple[Node, int], Lowered], dtype: torch.dtype | None
    ) -> None:
        self.graph, self.node, self.low, self.dtype = graph, node, low, dtype

    @property
    def is_exact(self) -> bool:
        """Whether the weight is read as it is."""
        weight = self.node.args[1]
        assert isinstance(weight, Node), "a product with a tensor"
        return self._lowered(weight, axis=1)[0] is weight

    def rewrite(self, spell: Callable[[Node, Node, Node | None], Node]) -> None:
        """Replace the product of x [..., in] and weight [out, in] by `spell(x [M, in], weight, bias)`, viewed."""
        x, weight, bias = self.node.args
        assert isinstance(x, Node) and isinstance(weight, Node), "a product of tensors"
        assert bias is None or isinstance(bias, Node), "a bias that is a tensor"
        with self.graph.inserting_before(self.node):
            rows = self.call(aten.reshape.default, x, [-1, x.meta["val"].shape[-1]])
            made = self.call(aten.view.default, spell(rows, weight, bias), list(self.node.meta["val"].shape))
        self.node.replace_all_uses_with(made)
        self.graph.erase_node(self.node)

    def padded_gemm(self, x: Node, weight: Node, bias: Node | None) -> Node:
        """A GEMM whose row count gives each row the same bits wherever it stands."""
        count = x.meta["val"].shape[0]
        missing = -count % ROWS if count > 2 else 0
        if not missing:
            return self.gemm(x, weight, bias)
        padded = self.call(aten.constant_pad_nd.default, x, [0, 0, 0, missing])
        return self.call(aten.slice.Tensor, self.gemm(padded, weight, bias), 0, 0, count)

    def gemm(self, x: Node, weight: Node, bias: Node | None) -> Node:
        """x [M, in] by weight [out, in] as a GEMM in the type that the weight is read in."""
        low, scale = self._lowered(weight, axis=1)
        if low is weight:
            return self._product(x, weight, bias)
        if scale is None:
            out = self._product(self._as(x, low.meta["val"].dtype), low, None)
            out = self._as(out, self.node.meta["val"].dtype)
        elif has_int8_gemm(low.meta["val"]):
            out = self.call(LINEAR_INT8, x, low, scale)
        else:
            out = self._product(x, self._as(low, self.node.meta["val"].dtype), None)
            out = self.call(aten.mul.Tensor, out, scale)
        return out if bias is None else self.call(aten.add.Tensor, out, bias)

    def _product(self, x: Node, weight: Node, bias: Node | None) -> Node:
        if has_onednn(weight.meta["val"]):
            return self.call(LINEAR, x, weight, bias)
        turned = self.call(aten.permute.default, weight, [1, 0])
        if bias is None:
            return self.call(aten.mm.default, x, turned)
        return self.call(aten.addmm.default, bias, x, turned)

    def reduction(self, x: Node, weight: Node, bias: Node | None) -> Node:
        """x [1, in] by weight [out, in] as a product and a sum."""
        low, scale = self._lowered(weight, axis=1)
        product = self.call(aten.mul.Tensor, self._as(low, self.node.meta["val"].dtype), x)
        total = self.call(aten.sum.dim_IntList, product, [-1])
        if scale is not None:
            total = self.call(aten.mul.Tensor, total, scale)
        return total if bias is None else self.call(aten.add.Tensor, total, bias)

    def _as(self, value: Node, dtype: torch.dtype) -> Node:
        if value.meta["val"].dtype == dtype:
            return value
        return self.call(torch.ops.prims.convert_element_type.default, value, dtype)

    def _lowered(self, weight: Node, axis: int) -> Lowered:
        """The weight, summed over along `axis`, as inputs of the draft type; any other value stays as it is."""
        value = weight.meta["val"]
        if self.dtype is None or value.dtype.itemsize <= self.dtype.itemsize or value.dim() != 2:
            return weight, None
        if (weight, axis) not in self.low:
            self.low[weight, axis] = self._lower(weight, self.dtype, axis)
        return self.low[weight, axis]

    def _lower(self, weight: Node, dtype: torch.dtype, axis: int) -> Lowered:
        if weight.op == "placeholder" and weight.meta.get("captured_input") is not None:
            if dtype.is_floating_point:
                return self._copy(weight, Cast(dtype), "draft"), None
            return (
                self._copy(weight, Cast(dtype, axis), f"codes_{axis}"),
                self._copy(weight, Cast(dtype, axis, scale=True), f"scale_{axis}"),
            )
        if weight.target in TURNS:
            source, scale = self._lowered(weight.all_input_nodes[0], 1 - axis)
            if source is not weight.all_input_nodes[0]:
                with self.graph.inserting_after(_last_placeholder(self.graph)):
                    return self.call(weight.target, source, *weight.args[1:]), scale
        return weight, None

    def _copy(self, weight: Node, cast: Cast, suffix: str) -> Node:
        """A new input: the copy of a weight that `cast` describes."""
        with self.graph.inserting_after(weight):
            made = self.graph.placeholder(f"{weight.name}_{suffix}")
        made.meta.update(weight.meta, cast=cast)
        own = weight.meta["val"]
        with own.fake_mode:
            if cast.scale and cast.axis is not None:
                made.meta["val"] = torch.empty(own.shape[1 - cast.axis], dtype=own.dtype, device=own.device)
            else:
                made.meta["val"] = torch.empty_like(own, dtype=cast.dtype)
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
