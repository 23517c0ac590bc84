"""One captured graph becomes the variants that run: captured, and for a decode step draft and verify.

Before                                              After, `captured`
    k = cat([past_k, k_new]); v = ...                   k = cat([store.past(layer, 0), k_new]); v = ...
    o = scaled_dot_product_attention(q, k, v)           the same, and store.append(layer, q, k_new, v_new) at each site;
    return v, k, logits                                 returns the row outputs only
                                                   After, `unpadded` (where masks are causal, see causal_masks.py)
                                                        the same, under is_causal in place of a mask
                                                   After, `draft` and `verify` (decode steps only)
                                                        o = vericache.attend(q, k_new, v_new, past_k, past_v,
                                                                             lengths, pads, scale, layer, window, ...)
                                                        reads tokens, positions, lengths, pads; no mask, no past length,
                                                        and no slice of one token's hidden states that is all of them

Inputs that a variant adds carry their name in `meta["role"]`; those it keeps, their index in `meta["captured_input"]`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, GraphModule, Node

from vericache_compile.latent import absorb, expand
from vericache_compile.ops import ATTEND
from vericache_compile.passes.causal_masks import causal_masks, leave_to_is_causal
from vericache_compile.passes.evaluate import batch_symbols, bind_symbols, bounds, concrete
from vericache_compile.passes.program import (
    Program,
    SiteNodes,
    ancestors,
    changed,
    copy_graph,
    copy_module,
    example,
    expression,
    make_module,
    mutates,
    output_node,
    unsupported,
)
from vericache_compile.passes.spelled_attention import APPENDS

if TYPE_CHECKING:
    import sympy

LEADING = ("tokens", "positions", "lengths", "pads")
"""Inputs that come before all others: tokens and positions [B, 1], lengths and pads [B] (int64)."""
MAPPED = LEADING[:2]
"""Those of them that differ over a window."""
OVERWRITTEN = "a weight or buffer that changes in place"
STATE = "a state that each step overwrites, as recurrent and convolutional layers keep one"
NO_WINDOW = "nothing to be done: a round would have to take it back to the last token that stands"
ONLY_POSITIONS = "pass position_ids, and nothing else that varies with the past"


def is_decode(program: Program) -> bool:
    """Whether the graph is one decode step: one token per row over a cache of more than one length."""
    if program.found_roles.tokens_per_call != 1 or any(nodes.site.past is None for nodes in program.sites):
        return False
    held = bounds(program)
    return held is not None and held[0] != held[1]


def split_captured(program: Program) -> int:
    """Make the `captured` variant; returns the number of sites that hand their keys and values to the store.

    Caches that are written in place keep themselves: there it is the graph as it is.
    """
    _refuse_states(program)
    if any(nodes.site.in_place for nodes in program.sites):
        program.captured = copy_module(program.module)
        return 0
    _refuse_unknown_length(program)
    masks = causal_masks(program)
    program.captured = _captured(program, {mask for mask, is_padded in masks.items() if not is_padded})
    if any(masks.values()):
        program.unpadded = _captured(program, masks)
    return len(program.sites)


def _refuse_states(program: Program) -> None:
    """A call is repeated where a page of its cache was lost, and a window has no state for each token."""
    for index, node in enumerate(program.placeholders):
        known = index in program.found_roles.weights or node in program.cached
        is_float = isinstance(value := example(node), torch.Tensor) and value.is_floating_point()
        if is_float and not known and _is_overwritten(node):
            raise unsupported(STATE, node, NO_WINDOW)


def _is_overwritten(node: Node) -> bool:
    return any(mutates(user) and changed(user) is node for user in node.users)


def _captured(program: Program, masks: Collection[Node]) -> GraphModule:
    """The graph as captured, handing keys and values to the store; `masks` are left to `is_causal`."""
    graph, node_of = copy_graph(program.module)
    with graph.inserting_before(next(iter(graph.nodes))):
        store = graph.placeholder("store")
    for nodes in program.sites:
        if nodes.mask in masks:
            leave_to_is_causal(node_of[nodes.attention])
        with graph.inserting_after(node_of[nodes.attention]):
            parts = (node_of[n] for n in (nodes.query, nodes.key, nodes.value))
            weight = () if nodes.weight is None else (node_of[nodes.weight],)
            graph.call_method("append", (store, nodes.site.layer, *parts, *weight))
        for side, index in enumerate(nodes.site.past or ()):
            _read_past(graph, store, nodes.site.layer, side, node_of[program.placeholders[index]])
    idle = {node_of[node] for node in ancestors(list(masks)) if node.op != "placeholder"}
    for node in reversed(list(graph.nodes)):
        if node in idle and not node.users:
            graph.erase_node(node)
    made = make_module(program.module, graph)
    _return_rows(program, made, node_of)
    return made


def _read_past(graph: Graph, store: Node, layer: int, side: int, past: Node) -> None:
    """Where a cached input is appended to, its data comes from the store: only then need it be on the device."""
    for append in [user for user in past.users if user.target in APPENDS]:
        with graph.inserting_before(append):
            append.replace_input_with(past, graph.call_method("past", (store, layer, side)))


def _refuse_unknown_length(program: Program) -> None:
    """Where all layers slide, the length must be an input: Dynamo makes the first one that it sees a constant."""
    filled = [nodes.site for nodes in program.sites if nodes.site.past is not None]
    if not filled or program.found_roles.lengths or any(site.recent is None for site in filled):
        return
    inputs = program.placeholders
    held = [(example(inputs[i]).shape[2], site.recent) for site in filled for i in site.past or ()]
    if not all(isinstance(columns, int) and recent is not None and columns < recent for columns, recent in held):
        fix = "nothing: the next call, at another length, is taken"
        raise unsupported("a sliding cache whose length is a constant of the graph", program.sites[0].attention, fix)


def split_modes(program: Program) -> int:
    """Make the `draft` and `verify` variants of a decode step; returns the number of sites in both."""
    _refuse_odd_rows(program)
    for mode in ("draft", "verify"):
        program.variants[mode] = _canonical(program)
    return 2 * len(program.sites)


def _canonical(program: Program) -> GraphModule:
    graph, node_of = copy_graph(program.module)
    tokens = program.placeholders[program.found_roles.tokens]
    with graph.inserting_before(next(iter(graph.nodes))):
        leading = {name: _leading(graph, name, program.batch, example(tokens).device) for name in LEADING}
    node_of[tokens].replace_all_uses_with(leading["tokens"])
    for nodes in program.sites:
        _replace_attention(program, node_of, nodes, leading)
    for original in program.position_nodes:
        _replace_position(program, node_of[original], leading["positions"])
    for original in program.writes:
        call, buffer = node_of[original], node_of[original.all_input_nodes[0]]
        call.replace_all_uses_with(buffer)
        graph.erase_node(call)
    _drop_idle_slices(graph, batch_symbols(program))
    module = make_module(program.module, graph)
    _return_rows(program, module, node_of)
    replaced = (node for nodes in program.sites for node in (*nodes.spelled, *nodes.expansion))
    idle = {node_of[node] for node in (*program.idle, *replaced)}
    graph.eliminate_dead_code(lambda node: node not in idle and (node.is_impure() or mutates(node)))
    _drop_unused_inputs(program, module, node_of)
    return module


def _drop_idle_slices(graph: Graph, batch: set[sympy.Symbol]) -> None:
    """Slices that leave out nothing go, and with them integers that say where they start (`logits_to_keep`, say)."""

    def sizes(node: Node) -> list[Any] | None:
        """Sizes that are the same at each step: numbers, and the batch."""
        found = [expression(size) for size in getattr(example(node), "shape", ())]
        return found if found and all(isinstance(size, int) or size.free_symbols <= batch for size in found) else None

    for node in graph.find_nodes(op="call_function", target=operator.getitem):
        source, index = node.args
        parts = index if isinstance(index, tuple) else (index,)
        if not isinstance(source, Node) or not all(isinstance(part, slice) for part in parts):
            continue
        before = sizes(source)
        if before is not None and before == sizes(node) and all(part.step in (None, 1) for part in parts):
            node.replace_all_uses_with(source)


def _leading(graph: Graph, name: str, batch: int, device: torch.device) -> Node:
    node = graph.placeholder(name)
    shape = (batch, 1) if name in MAPPED else (batch,)
    node.meta.update(role=name, example_value=torch.zeros(shape, dtype=torch.int64, device=device))
    return node


def _replace_attention(program: Program, node_of: dict[Node, Node], nodes: SiteNodes, leading: dict[str, Node]) -> None:
    inputs = program.placeholders
    past = [node_of[inputs[i]] for i in nodes.site.past or ()]
    attention = node_of[nodes.attention]
    parts = [node_of[n] for n in (nodes.query, nodes.key, nodes.value)]
    cache = (*past, leading["lengths"], leading["pads"])
    with attention.graph.inserting_before(attention):
        if nodes.weight is not None:
            parts = _absorbed(attention, node_of[nodes.weight], *parts)
        arguments = (*parts, *cache, nodes.site.scale, nodes.site.layer, nodes.site.window, *_scores(nodes, node_of))
        made = _call(attention, ATTEND, arguments)
        if nodes.weight is not None:
            size = example(nodes.query).shape[3] - nodes.site.cached_sizes[1]
            made = _call(attention, expand, (made, node_of[nodes.weight], size))
    made.meta.update(attention.meta)
    before = example(nodes.attention)
    with attention.graph.inserting_before(attention):
        if before.dim() != 4:  # [B * H, T, E]
            made = attention.graph.call_method("flatten", (made, 0, 1))
        if before.dtype is not example(nodes.query).dtype:  # wider than what is cached; narrower under autocast
            made = attention.graph.call_method("to", (made, before.dtype))
    attention.replace_all_uses_with(made)


def _absorbed(attention: Node, weight: Node, query: Node, latent: Node, rotated: Node) -> list[Node]:
    """Query, key and value for attention over what is cached, of which `weight` would make keys and values."""
    q = _call(attention, absorb, (query, weight, example(rotated).shape[3]))
    return [q, _call(attention, torch.cat, ([latent, rotated], -1)), latent]


def _call(attention: Node, target: Callable[..., Any], arguments: tuple[Any, ...]) -> Node:
    """A call that counts as a part of an attention."""
    made = attention.graph.call_function(target, arguments)
    made.meta["stack_trace"] = attention.meta.get("stack_trace")
    return made


def _scores(nodes: SiteNodes, node_of: dict[Node, Node]) -> tuple[Any, ...]:
    """The operator's arguments that say what is done to scores, and that a latent is cached; none at a plain site."""
    site = nodes.site
    if site.is_plain and not site.latent:
        return ()
    sinks = None if nodes.sinks is None else node_of[nodes.sinks]
    alibi: tuple[Any, ...] = ()
    if site.alibi is not None:
        alibi = (list(site.alibi.slopes), site.alibi.dtype, site.alibi.relative)
    elif site.latent:
        alibi = (None, torch.float32, False)
    return (sinks, site.soft_cap, *alibi, *((True,) if site.latent else ()))


def _replace_position(program: Program, node: Node, positions: Node) -> None:
    """Positions [B, 1], given the rank of the node that they replace; rows that advance in step have one position."""
    rank = example(node).dim()
    shaped = positions
    if rank < 2:
        with node.graph.inserting_after(positions):
            shaped = node.graph.call_method("narrow", (positions, 0, 0, 1))
    if rank != 2:
        shape = (1,) * rank if rank < 2 else (program.batch, *(1,) * (rank - 1))
        with node.graph.inserting_after(shaped):
            shaped = node.graph.call_method("view", (shaped, shape))
    node.replace_all_uses_with(shaped)


def _return_rows(program: Program, module: GraphModule, node_of: dict[Node, Node]) -> None:
    output_node(module).args = (tuple(node_of[program.returned[i]] for i in program.rows),)
    module.recompile()


def _refuse_odd_rows(program: Program) -> None:
    """Rows are handed out one sequence at a time, so each must start with the batch."""
    env = bind_symbols(program, 1)
    for index in program.rows:
        node = program.returned[index]
        if [concrete(size, env) for size in example(node).shape[:1]] != [program.batch]:
            raise unsupported("an output without one row per sequence", node, "return tensors [batch, ...]")


def _drop_unused_inputs(program: Program, module: GraphModule, node_of: dict[Node, Node]) -> None:
    """Remove inputs that nobody reads; what is still read must be understood."""
    for index, original in enumerate(program.placeholders):
        node = node_of[original]
        if not node.users:
            module.graph.erase_node(node)
            continue
        if reason := _not_understood(program, index, node):
            raise unsupported(reason, node, NO_WINDOW if reason == OVERWRITTEN else ONLY_POSITIONS)
        node.meta["captured_input"] = index
    module.recompile()


def _not_understood(program: Program, index: int, node: Node) -> str | None:
    """Why a variant may not read a captured input (None where it may)."""
    value = example(node)
    if isinstance(value, torch.SymInt):
        known = value.node.expr in batch_symbols(program)
        return None if known else "the past length in a computation other than positions and masks"
    if program.placeholders[index] in program.cached:
        known = all(user.target is ATTEND for user in node.users)
        return None if known else "cached keys or values in a computation other than attention"
    if index == program.found_roles.mask:
        return "the padding mask in a computation other than attention and positions"
    if index not in program.found_roles.weights:
        return "an input that is neither weight, token, position, mask nor cache"
    return OVERWRITTEN if _is_overwritten(node) else None
