"""Batch the decode program over a window of W tokens, and bring both variants to aten.

    draft:  tokens [B, 1] -> logits [B, 1, V] -> next token [B, 1]
    verify: tokens [W, B, 1] -> logits [W, B, 1, V], attention sees [B, H, W, D], causal in the window

Every matrix product with a weight is one `vericache.linear` in both, and one with the weights of experts that tokens
choose one `vericache.experts_mm` (`expert_products`), so verify has as many GEMMs as one decode step and none over an
expanded weight. A model for which that does not come out raises UnsupportedGraph: its window would cost W decode steps.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._guards import tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.traceback import preserve_node_meta

from vericache_compile import ops
from vericache_compile.passes.evaluate import bind_symbols, concrete
from vericache_compile.passes.expert_products import ExpertProducts
from vericache_compile.passes.program import Program, example, output_node, placeholders, returned, unsupported
from vericache_compile.passes.split_modes import MAPPED
from vericache_compile.passes.trace_regions import trace_regions

if TYPE_CHECKING:
    import sympy

COLUMNS = 64
"""Past columns of the example cache that variants are traced with; no traced shape depends on it."""
FIX = "run this model without vericache, or report it"
aten = torch.ops.aten
PRODUCT = re.compile(r"(mm|linear)(_|$)")
"""In the name of every matrix product: vericache.linear, mm, addmm, bmm, _grouped_mm, _scaled_mm ..."""
VIEWS = {aten.alias.default, aten.slice.Tensor, aten.view.default, aten.expand.default, aten.permute.default}
MATMULS = (torch.matmul, torch.mm, operator.matmul, "matmul", "mm", "__matmul__")


def expand_window(program: Program) -> int:
    """Trace draft over one token and verify over `program.window`; returns the number of aten nodes made."""
    draft, verify = program.variants["draft"], program.variants["verify"]
    program.variants["draft"] = _trace(program, draft, 0)
    program.variants["verify"] = _trace(program, verify, program.window)
    _refuse_slow_window(program.variants["draft"], program.variants["verify"])
    _return_next_token(program.variants["draft"], program.logits)
    return sum(len(module.graph.nodes) for module in program.variants.values())


def _return_next_token(draft: GraphModule, logits: int) -> None:
    """Return the token of the largest logit, and no rows."""
    output, rows = output_node(draft), returned(draft)[logits]
    with draft.graph.inserting_before(output):
        token = draft.graph.call_function(aten.argmax.default, (rows, -1))
    token.meta["val"] = rows.meta["val"].argmax(-1)
    output.args = ((token,),)
    sites = draft.graph.find_nodes(op="call_function", target=ops.ATTEND)
    draft.graph.eliminate_dead_code()
    left = set(draft.graph.find_nodes(op="call_function", target=ops.ATTEND))
    if lost := [site for site in sites if site not in left]:
        raise unsupported("logits that do not read all attentions, beside rows that do", lost[0], FIX)
    draft.recompile()


def find_gemms(module: GraphModule) -> list[Node]:
    """The matrix products of a variant."""
    calls = [node for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return [node for node in calls if PRODUCT.search(node.target._opname)]


def find_expanded(module: GraphModule) -> list[Node]:
    """The matrix products of a variant that read an operand expanded (stride 0) along some axis."""
    return [node for node in find_gemms(module) if any(map(_is_expanded, node.all_input_nodes))]


def _is_expanded(operand: Node) -> bool:
    value = operand.meta["val"]
    return any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True))


def _refuse_slow_window(draft: GraphModule, verify: GraphModule) -> None:
    left = Counter(node.meta.get("stack_trace") for node in find_gemms(draft))
    left.subtract(node.meta.get("stack_trace") for node in find_gemms(verify))
    if left.total():
        more = next(node for node in find_gemms(verify) if left[node.meta.get("stack_trace")])
        raise unsupported("a product with weights that a window cannot share among its tokens", more, FIX)
    if expanded := find_expanded(verify):
        raise unsupported("a product with weights that are copied for each token of a window", expanded[0], FIX)


class _Linears(Interpreter):
    """Runs a captured graph with every product by a weight spelled as `vericache.linear`."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.experts = ExpertProducts()

    def run_node(self, n: Node) -> Any:
        try:
            return super().run_node(n)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise unsupported(f"a call that a window cannot be put through ({reason})", n, FIX) from error

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        product = self._product(target, args, kwargs)
        return super().call_function(target, args, kwargs) if product is None else product

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target == "scatter_" and len(args) == 4 and not isinstance(args[3], Tensor):  # has no rule for a window
            return args[0].copy_(torch.scatter(*args))
        product = self._product(target, args, kwargs)
        return super().call_method(target, args, kwargs) if product is None else product

    def _product(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        product = _as_product(target, args, kwargs)
        return self.experts.spell(target, args, kwargs) if product is None else product


def _as_product(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """A matrix product as one GEMM over all rows; an outer product as the multiplication that it is."""
    product: Tensor | None = None
    if target is torch.nn.functional.linear:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
        product = _linear(given["input"], given["weight"], given.get("bias"))
    elif target in (torch.addmm, "addmm") and not kwargs and args[0].dim() == 1 and _is_shared(args[2]):
        product = _linear(args[1], args[2].t(), args[0])
    elif target in MATMULS and not kwargs:
        x, weight = args
        if x.dim() > 1 and weight.dim() > 1 and x.shape[-1] == 1:
            product = torch.mul(x, weight)
        elif weight.dim() == 2 and _is_shared(weight):
            product = _linear(x, weight.t(), None)
    return product


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product in the type that autocast gives it, where that is on."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    own = bias is None or bias.shape == weight.shape[:1]
    made: Tensor = ops.LINEAR(x, weight, bias if own else None)
    return made if own or bias is None else made + bias


def _is_shared(weight: Tensor) -> bool:
    """Whether a value is the same for all tokens of the window."""
    return not torch._C._functorch.is_batchedtensor(weight)


def _trace(program: Program, module: GraphModule, window: int) -> GraphModule:
    """The aten graph on fake inputs shaped as `module`'s; tokens and positions gain a leading window, if any."""
    nodes = placeholders(module)
    env = bind_symbols(program, COLUMNS)
    mapped = [node for node in nodes if window and node.meta.get("role") in MAPPED]
    with tracing(None), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), preserve_node_meta():
        inputs = {node: _fake(node, env, window if node in mapped else 0) for node in nodes}
        traced = trace_regions(module, inputs, mapped, lambda region: _Linears(region).run)
    for made, node in zip(placeholders(traced), nodes, strict=True):
        made.meta["captured_input"] = node.meta.get("captured_input")
        made.meta["role"] = node.meta.get("role")
    _drop_idle_views(traced)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _drop_idle_views(module: GraphModule) -> None:
    """Views that change neither shape nor strides go, so that spellings of one program become one segment."""
    for node in module.graph.nodes:
        if node.target in VIEWS:
            before, after = node.args[0].meta["val"], node.meta["val"]
            if (before.shape, before.stride()) == (after.shape, after.stride()):
                node.replace_all_uses_with(node.args[0])


def _fake(node: Node, env: Mapping[sympy.Symbol, int], window: int) -> Any:
    value = example(node)
    if isinstance(value, torch.SymInt):
        return concrete(value, env)
    shape = [concrete(size, env) for size in value.shape]
    if node.meta.get("captured_input") is not None and all(isinstance(size, int) for size in value.shape):
        return torch.empty_strided(shape, value.stride(), dtype=value.dtype, device=value.device)
    return torch.empty([window, *shape] if window else shape, dtype=value.dtype, device=value.device)
