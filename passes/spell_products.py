"""Spell every product with a weight in aten, in the form that suits its variant.

    verify, eager, many rows     vericache.linear(x, w, b)  ->  stays, or view, mm or addmm, view
    draft with few rows          vericache.linear(x, w, b)  ->  cat((w * x[m]).sum(-1) for m) + b
    draft                        vericache.heads_mm(x, w)   ->  bmm (in verify it stays)

Verify's bits must not depend on where in a window a token stands. The operator keeps to that where a kernel of ours, or
oneDNN on the CPU, takes the weight. Other libraries were seen to for 2 rows and for multiples of 4, and not for
5, 6, 9 or 10: there, row counts are padded.

A few rows make a product that is bound by the weight's bytes: fastest as one reduction per row, which Inductor fuses
with each other (the weight is then read once) and with their neighbours. Drafting needs no exact weights, so with a
`draft_dtype` it reads copies of that type (verify always reads the model's own); the runtime makes the copies once.
An int8 copy is codes in groups and a scale per group:

    (w * x[m]).sum(-1)  ->  (codes * scale * x[m]).sum((-2, -1))

More rows than a few, and segments that run eagerly, read bfloat16 copies instead of int8 ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from vericache_compile.ops import HEADS_MM, LINEAR, ROWS, has_onednn, keeps_rows_apart
from vericache_compile.passes.program import Program
from vericache_compile.plan import FEW, Cast

aten = torch.ops.aten
TURNS = (aten.t.default, aten.permute.default, aten.transpose.int)
"""Views that swap the axes of a matrix; views that change nothing were dropped when the variant was traced."""


def spell_products(program: Program, *, inductor: bool, draft_dtype: torch.dtype | None) -> int:
    """Rewrite the `vericache.linear` nodes of both variants that have to change; returns how many."""
    count = 0
    for mode, module in program.variants.items():
        copies: dict[tuple[Node, Cast], list[Node]] = {}
        for node in list(module.graph.find_nodes(op="call_function", target=LINEAR)):
            fake = node.args[0].meta["val"]
            few = inductor and fake.shape[:-1].numel() <= FEW.get(fake.device.type, 1)
            dtype = dtype_read(draft_dtype, fake.device, few=few)
            spelling = _Spelling(module.graph, node, copies, dtype if mode == "draft" else None)
            if mode == "draft" and few:
                spelling.rewrite(spelling.reductions)
            elif spelling.is_exact and keeps_rows_apart(node.args[1].meta["val"]):
                continue
            else:
                spelling.rewrite(spelling.gemm if mode == "draft" else spelling.padded_gemm)
            count += 1
        for node in list(module.graph.find_nodes(op="call_function", target=HEADS_MM)) if mode == "draft" else ():
            _Spelling(module.graph, node, {}, None).by_head()
            count += 1
        module.graph.eliminate_dead_code()
        module.recompile()
    return count


def dtype_read(draft_dtype: torch.dtype | None, device: torch.device, *, few: bool) -> torch.dtype | None:
    """The type that a draft of few rows, or of more, reads weights in: int8 pays for few. None for the weight's own."""
    if few or draft_dtype is not torch.int8:
        return draft_dtype
    return torch.bfloat16 if device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported() else None


class _Spelling:
    """Rewrites one product; every node it makes carries a fake value and the product's source line."""

    def __init__(
        self, graph: Graph, node: Node, copies: dict[tuple[Node, Cast], list[Node]], dtype: torch.dtype | None
    ) -> None:
        self.graph, self.node, self.copies, self.dtype = graph, node, copies, dtype

    @property
    def is_exact(self) -> bool:
        """Whether the weight is read as it is."""
        weight = self.node.args[1]
        assert isinstance(weight, Node), "a product with a tensor"
        return self._lowered(weight) == [weight]

    def rewrite(self, spell: Callable[[Node, Node, Node | None], Node]) -> None:
        """Replace the product of x [..., in] and weight [out, in] by `spell(x [M, in], weight, bias)`, viewed."""
        x, weight, bias = self.node.args[:3]
        assert isinstance(x, Node) and isinstance(weight, Node), "a product of tensors"
        assert bias is None or isinstance(bias, Node), "a bias that is a tensor"
        with self.graph.inserting_before(self.node):
            rows = self.call(aten.reshape.default, x, [-1, x.meta["val"].shape[-1]])
            made = self.call(aten.view.default, spell(rows, weight, bias), list(self.node.meta["val"].shape))
        self.node.replace_all_uses_with(made)
        self.graph.erase_node(self.node)

    def by_head(self) -> None:
        """Replace the product of x [..., H, in] and weight [H, in, out] by a batched one."""
        x, weight = self.node.args
        assert isinstance(x, Node), "a product of tensors"
        heads, size = x.meta["val"].shape[-2:]
        with self.graph.inserting_before(self.node):
            rows = self.call(aten.permute.default, self.call(aten.reshape.default, x, [-1, heads, size]), [1, 0, 2])
            made = self.call(aten.permute.default, self.call(aten.bmm.default, rows, weight), [1, 0, 2])
            made = self.call(aten.reshape.default, made, list(self.node.meta["val"].shape))
            made = self.call(aten.clone.default, made, memory_format=torch.contiguous_format)
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
        [low] = self._lowered(weight)
        if low is weight:
            return self._product(x, weight, bias)
        out = self._as(self._product(self._as(x, low.meta["val"].dtype), low, None), self.node.meta["val"].dtype)
        return out if bias is None else self.call(aten.add.Tensor, out, bias)

    def _product(self, x: Node, weight: Node, bias: Node | None) -> Node:
        if has_onednn(weight.meta["val"]):
            return self.call(LINEAR, x, weight, bias)
        turned = self.call(aten.permute.default, weight, [1, 0])
        if bias is None:
            return self.call(aten.mm.default, x, turned)
        return self.call(aten.addmm.default, bias, x, turned)

    def reductions(self, x: Node, weight: Node, bias: Node | None) -> Node:
        """x [M, in] by weight [out, in] as M products and sums, in float32 where the weight is int8."""
        dtype = self.node.meta["val"].dtype
        low, *scale = self._lowered(weight)
        read = self._as(low, torch.float32 if scale else dtype)
        if scale:
            read = self.call(aten.mul.Tensor, read, *scale)
        count, size = x.meta["val"].shape
        shape = list(read.meta["val"].shape[1:])
        x = self.call(aten.clone.default, x, memory_format=torch.contiguous_format)
        totals = []
        for m in range(count):
            row = self.call(aten.as_strided.default, x, shape, [shape[-1], 1][-len(shape) :], m * size)
            total = self.call(
                aten.sum.dim_IntList, self.call(aten.mul.Tensor, read, row), list(range(1, 1 + len(shape)))
            )
            totals.append(self.call(aten.unsqueeze.default, total, 0))
        out = self._as(self.call(aten.cat.default, totals), dtype)
        return out if bias is None else self.call(aten.add.Tensor, out, bias)

    def _as(self, value: Node, dtype: torch.dtype) -> Node:
        if value.meta["val"].dtype == dtype:
            return value
        return self.call(torch.ops.prims.convert_element_type.default, value, dtype)

    def _lowered(self, weight: Node) -> list[Node]:
        """The weight [out, in] as draft reads it: a copy, or int8 codes and scales; any other value stays as it is."""
        source, turned = weight, False
        while source.target in TURNS:
            source, turned = source.all_input_nodes[0], not turned
        value = source.meta["val"]
        is_input = source.op == "placeholder" and source.meta.get("captured_input") is not None
        if self.dtype is None or not is_input or value.dim() != 2 or value.dtype.itemsize <= self.dtype.itemsize:
            return [weight]
        cast = Cast(self.dtype, turned)
        if (source, cast) not in self.copies:
            self.copies[source, cast] = self._copy(source, cast)
        return self.copies[source, cast]

    def _copy(self, weight: Node, cast: Cast) -> list[Node]:
        """New inputs: the copy of a weight that `cast` describes."""
        with weight.meta["val"].fake_mode, torch.no_grad():
            values = cast.copies(weight.meta["val"])
        made: list[Node] = []
        for value, name in zip(reversed(values), ("scale", "codes") if len(values) == 2 else ("draft",), strict=True):
            with self.graph.inserting_after(weight):
                node = self.graph.placeholder(f"{weight.name}_{name}")
            node.meta.update(weight.meta, val=value, cast=replace(cast, scale=name == "scale"))
            made.insert(0, node)
        return made

    def call(self, target: Callable[..., Any], *args: Any, **more: Any) -> Node:
        """A call node with its fake value."""
        made = self.graph.call_function(target, args, more)
        made.meta["stack_trace"] = self.node.meta.get("stack_trace")
        with self.node.meta["val"].fake_mode, torch.no_grad():
            made.meta["val"] = target(*map_arg(args, lambda value: value.meta["val"]), **more)
        return made
