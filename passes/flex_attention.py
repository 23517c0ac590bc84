"""Read a call of FlexAttention, for `find_attention`.

    o, _, _ = flex_attention(q, k, v, score_mod, (..., block sizes, mask_mod), scale, ...)

It is taken where scores stay as they are: a `score_mod` that returns its score. A prefill runs as captured, whatever
its mask. A token behind a cache must see all of it, as `block_mask=None` says: what a block mask holds differs from
call to call, and is not read here.
"""

from __future__ import annotations

import operator

from torch.fx import Graph, GraphModule, Node

from vericache_compile.passes.program import example, expression, target_name, unsupported
from vericache_compile.passes.spelled_attention import Attention

WHOLE = 1 << 30
"""The block size of a block mask that has one block for all."""
PLAIN = "leave score_mod out, or attend by scaled_dot_product_attention"
UNMASKED = "give no block_mask to one token behind its cache, or attend by scaled_dot_product_attention"


def is_flex(node: Node) -> bool:
    """Whether a node is a call of FlexAttention."""
    return node.op == "call_function" and target_name(node) == "flex_attention"


def read_flex(call: Node) -> Attention:
    """What a call of FlexAttention attends to; raises UnsupportedGraph where it changes scores, or may hide columns."""
    query, key, value, score_mod, block_mask, scale = call.args[:6]
    results = [user for user in call.users if user.users]
    if [(user.target, user.args[1]) for user in results] != [(operator.getitem, 0)]:
        raise unsupported("FlexAttention whose sums of weights are used", call, PLAIN)
    if not _returns_first(_graph(call, score_mod)):
        raise unsupported("FlexAttention with a score_mod", call, PLAIN)
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node), "they are tensors"
    assert isinstance(block_mask, tuple), "as flex_attention calls its operator"
    if not isinstance(scale, (int, float)):
        raise unsupported("an attention scale that is not a number", call, "use a number")
    is_token = expression(example(query).shape[2]) == 1
    if is_token and not (block_mask[-2] == WHOLE and _is_true(_graph(call, block_mask[-1]))):
        raise unsupported("FlexAttention of one token under a block mask", call, UNMASKED)
    return Attention(results[0], query, key, value, scale, None, ())


def _graph(call: Node, name: object) -> Graph:
    assert isinstance(name, Node) and isinstance(name.target, str), "score_mod and mask_mod are graphs of their own"
    owner = call.graph.owning_module
    assert owner is not None, "a captured graph has a module"
    module = owner.get_submodule(name.target)
    assert isinstance(module, GraphModule), f"{name.target} was captured"
    return module.graph


def _returns_first(graph: Graph) -> bool:
    nodes = list(graph.nodes)
    return bool(nodes[-1].args[0] is nodes[0])


def _is_true(graph: Graph) -> bool:
    """Whether a mask_mod is the one that hides nothing."""
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    return [target_name(node) for node in calls] == ["new_ones"]
