"""Spell every product with a weight in aten, in the form that suits its variant.

    verify, eager, many rows     vericache.linear(x, w, b)  ->  stays, or view, mm or addmm, view
    draft in int8, few rows      vericache.linear(x, w, b)  ->  vericache.int8_linear(x, codes, scales) + b
    draft with few rows          vericache.linear(x, w, b)  ->  cat((w * x[m]).sum(-1) for m) + b
    draft                        vericache.heads_mm(x, w)   ->  bmm (in verify it stays)

Verify's bits must not depend on where in a window a token stands. The operator keeps to that where a kernel of ours, or
oneDNN on the CPU, takes the weight. Other libraries were seen to for 2 rows and for multiples of 4, and not for
5, 6, 9 or 10: there, row counts are padded.

A few rows make a product that is bound by the weight's bytes: fastest as one reduction per row, which Inductor fuses
with each other (the weight is then read once) and with their neighbours. Drafting needs no exact weights, so with a
`draft_dtype` it reads copies of that type (verify always reads the model's own); the runtime makes the copies once.
Copies in int8 have a kernel, which takes all weights that the same rows are multiplied by at once. More rows than a few
read bfloat16 copies instead.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from vericache_compile.kernels.row_invariant_linear import multiplies_bfloat16
from vericache_compile.ops import HEADS_MM, INT8_LINEAR, LINEAR, ROWS, has_onednn, keeps_rows_apart
from vericache_compile.passes.program import Program
from vericache_compile.plan import FEW, Cast

aten = torch.ops.aten
REDUCED = {"cpu": 8}
"""Up to how many rows of draft become reductions, by device: 1 where none is given."""
TURNS = (aten.t.default, aten.permute.default, aten.transpose.int)
"""Views that swap the axes of a matrix; views that change nothing were dropped when the variant was traced."""


def spell_products(program: Program, *, inductor: bool, draft_dtype: torch.dtype | None) -> int:
    """Rewrite the `vericache.linear` nodes of both variants that have to change; returns how many."""
    count = 0
    for mode, module in program.variants.items():
        copies: dict[tuple[Node, Cast], list[Node]] = {}
        together: dict[Node, list[_Spelling]] = {}
        for node in list(module.graph.find_nodes(op="call_function", target=LINEAR)):
            fake = node.args[0].meta["val"]
            rows = fake.shape[:-1].numel()
            dtype = dtype_read(draft_dtype, fake.device, rows) if mode == "draft" else None
            spelling = _Spelling(module.graph, node, copies, dtype)
            if spelling.is_int8:
                together.setdefault(node.args[0], []).append(spelling)
            elif mode == "draft" and inductor and rows <= REDUCED.get(fake.device.type, 1):
                spelling.rewrite(spelling.reductions)
            elif spelling.is_exact and keeps_rows_apart(node.args[1].meta["val"]):
                continue
            else:
                spelling.rewrite(spelling.gemm if mode == "draft" else spelling.padded_gemm)
            count += 1
        for products in together.values():
            spell_int8(products)
        for node in list(module.graph.find_nodes(op="call_function", target=HEADS_MM)) if mode == "draft" else ():
            _Spelling(module.graph, node, {}, None).by_head()
            count += 1
        module.graph.eliminate_dead_code()
        module.recompile()
    return count


def dtype_read(draft_dtype: torch.dtype | None, device: torch.device, rows: int) -> torch.dtype | None:
    """The type that a draft of so many rows reads weights in: int8 pays for few. None for the weight's own."""
    if draft_dtype is not torch.int8 or rows <= FEW:
        return draft_dtype
    return torch.bfloat16 if device.type != "cpu" or multiplies_bfloat16() else None


class _Spelling:
    """Rewrites one product; every node it makes carries a fake value and the product's source line."""

    def __init__(
        self, graph: Graph, node: Node, copies: dict[tuple[Node, Cast], list[Node]], dtype: torch.dtype | None
    ) -> None:
        self.graph, self.node, self.copies, self.dtype = graph, node, copies, dtype

    @property
    def weight(self) -> Node:
        """The product's weight."""
        weight = self.node.args[1]
        assert isinstance(weight, Node), "a product with a tensor"
        return weight

    @property
    def bias(self) -> Node | None:
        """What is added to the product."""
        bias = self.node.args[2]
        assert bias is None or isinstance(bias, Node), "a bias that is a tensor"
        return bias

    @property
    def is_exact(self) -> bool:
        """Whether the weight is read as it is."""
        return self.lowered(self.weight) == [self.weight]

    @property
    def is_int8(self) -> bool:
        """Whether the weight is read in an int8 copy."""
        return self.dtype is torch.int8 and not self.is_exact

    def rewrite(self, spell: Callable[[Node, Node, Node | None], Node]) -> None:
        """Replace the product of x [..., in] and weight [out, in] by `spell(x [M, in], weight, bias)`, viewed."""
        with self.graph.inserting_before(self.node):
            self.put(spell(self.rows(), self.weight, self.bias))

    def rows(self) -> Node:
        """x as [M, in]."""
        x = self.node.args[0]
        assert isinstance(x, Node), "a product of tensors"
        return self.call(aten.reshape.default, x, [-1, x.meta["val"].shape[-1]])

    def put(self, made: Node) -> None:
        """Use a value [M, out] in place of the product."""
        viewed = self.call(aten.view.default, made, list(self.node.meta["val"].shape))
        self.node.replace_all_uses_with(viewed)
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
        [low] = self.lowered(weight)
        if low is weight:
            return self._product(x, weight, bias)
        return self.plus(self._product(self.as_type(x, low.meta["val"].dtype), low, None), bias)

    def _product(self, x: Node, weight: Node, bias: Node | None) -> Node:
        if has_onednn(weight.meta["val"]):
            return self.call(LINEAR, x, weight, bias)
        turned = self.call(aten.permute.default, weight, [1, 0])
        if bias is None:
            return self.call(aten.mm.default, x, turned)
        return self.call(aten.addmm.default, bias, x, turned)

    def reductions(self, x: Node, weight: Node, bias: Node | None) -> Node:
        """x [M, in] by weight [out, in] as M products and sums."""
        [low] = self.lowered(weight)
        read = self.as_type(low, self.node.meta["val"].dtype)
        count, size = x.meta["val"].shape
        x = self.call(aten.clone.default, x, memory_format=torch.contiguous_format)
        totals = []
        for m in range(count):
            row = self.call(aten.as_strided.default, x, [size], [1], m * size)
            total = self.call(aten.sum.dim_IntList, self.call(aten.mul.Tensor, read, row), [1])
            totals.append(self.call(aten.unsqueeze.default, total, 0))
        return self.plus(self.call(aten.cat.default, totals), bias)

    def plus(self, value: Node, bias: Node | None) -> Node:
        """A value in the product's type, plus the bias."""
        out = self.as_type(value, self.node.meta["val"].dtype)
        return out if bias is None else self.call(aten.add.Tensor, out, bias)

    def as_type(self, value: Node, dtype: torch.dtype) -> Node:
        """A value in a type."""
        if value.meta["val"].dtype == dtype:
            return value
        return self.call(torch.ops.prims.convert_element_type.default, value, dtype)

    def lowered(self, weight: Node) -> list[Node]:
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


def spell_int8(products: Sequence[_Spelling]) -> None:
    """Replace the products of the same x [..., in] by one of x, in float32, with the int8 copies of all weights."""
    first = products[0]
    outs = [product.node.meta["val"].shape[-1] for product in products]
    copies = zip(*(product.lowered(product.weight) for product in products), strict=True)
    with first.graph.inserting_before(first.node):
        made = first.call(INT8_LINEAR, first.as_type(first.rows(), torch.float32), *map(list, copies), outs)
        own = [first.call(operator.getitem, made, i) for i in range(len(products))]
    for product, out in zip(products, own, strict=True):
        with first.graph.inserting_before(product.node):
            product.put(product.plus(out, product.bias))
