"""Find every (append to cache, attend) pair: a site. Only this and `spelled_attention` know how models spell attention.

    k = cat([past_k, k_new], -2)                 one Site:
    v = cat([past_v, v_new], -2)            ->     query q, key k_new, value v_new, mask, scale,
    o = scaled_dot_product_attention(q, k, v)      cached in inputs (past_k, past_v), returned as outputs (k, v)

K and V may reach the attention through a repetition over the query group (repeat_kv), which is checked by running it.
An empty cache (prefill) appends to nothing or to an empty tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from vericache_compile.errors import UnsupportedGraph
from vericache_compile.passes.evaluate import concrete
from vericache_compile.passes.program import (
    Program,
    SiteNodes,
    example,
    is_weight,
    output_node,
    row_width,
    target_name,
    unsupported,
)
from vericache_compile.passes.spelled_attention import APPENDS, CASTS, Attention, call_name, read_spelled
from vericache_compile.plan import Output, OutputRole, Site

ATTENTION = torch.nn.functional.scaled_dot_product_attention
NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
VIEWS = {"expand", "reshape", "view", "contiguous", "unsqueeze", "flatten", "clone", "getitem"}
REPEATS = VIEWS | CASTS | {"repeat_interleave", "repeat", "tile"}
"""Calls that may stand between cache and attention, if together they repeat each head in place."""
COLUMNS = 3
"""Every symbolic length while a repetition is run."""
CACHE = "use transformers' DynamicCache (the default)"


@dataclass(frozen=True)
class Appended:
    """One side (keys or values) of a site."""

    output: Node
    """The cache tensor that the graph returns."""
    new: Node
    past: int | None
    """Input that holds the cached part; None where there is none yet."""
    repeats: tuple[Node, ...]
    """Calls from the cache tensor to what attention reads."""


@dataclass
class Finder:
    """What matching one site needs to know of the whole graph."""

    program: Program
    returned: list[Any]
    inputs: dict[Node, int]
    proved: dict[str, bool] = field(default_factory=dict)
    """Repetitions that were run, by their text."""


def find_attention(program: Program) -> int:
    """Fill `program.sites` and `program.outputs`; returns the number of sites. Raises UnsupportedGraph."""
    finder = Finder(program, program.returned, {node: i for i, node in enumerate(program.placeholders)})
    cached: dict[Node, OutputRole] = {}
    pasts: set[int | None] = set()
    for layer, call in enumerate(find_calls(program)):
        site, keys, values = _match(finder, layer, call)
        for side, kind in ((keys, Output.KEYS), (values, Output.VALUES)):
            if side.output in cached or side.past in pasts - {None}:
                fix = "give each attention its own keys and values"
                raise unsupported("two uses of one cache tensor", call.result, fix)
            cached[side.output] = OutputRole(kind, layer)
            pasts.add(side.past)
        program.sites.append(site)
    program.outputs = _classify_outputs(program, finder.returned, cached)
    return len(program.sites)


def find_calls(program: Program) -> list[Attention]:
    """The attentions of a graph in order; raises UnsupportedGraph where there is none."""
    calls: list[Attention] = []
    for node in program.module.graph.nodes:
        if node.target is ATTENTION:
            calls.append(_read_call(node))
        elif call_name(node) == "softmax" and (spelled := read_spelled(node)) is not None:
            calls.append(spelled)
    if not calls:
        raise _no_attention(program)
    return calls


def _no_attention(program: Program) -> UnsupportedGraph:
    found, fix = "no scaled_dot_product_attention call", "compile the whole model"
    softmax = next((node for node in program.module.graph.nodes if call_name(node) == "softmax"), None)
    if softmax is not None:
        found = f"a softmax that is not read as attention, and {found}"
    return unsupported(found, softmax, f'load the model with attn_implementation="sdpa", and {fix}')


def _read_call(call: Node) -> Attention:
    """What scaled_dot_product_attention is given."""
    given: dict[str, Any] = dict(zip(NAMES, call.args, strict=False)) | call.kwargs
    mask, scale = given.get("attn_mask"), given.get("scale")
    if given.get("dropout_p", 0.0):
        raise unsupported("attention with dropout", call, "call model.eval()")
    if not isinstance(scale, (int, float, type(None))):
        raise unsupported("an attention scale that is not a number", call, "use a number")
    assert mask is None or isinstance(mask, Node), f"{call.name} has a mask of type {type(mask).__name__}"
    query, key, value = (given[name] for name in NAMES[:3])
    sides = () if mask is None else (mask,)
    causal = bool(given.get("is_causal"))
    return Attention(call, query, key, value, scale, mask, sides, is_causal=causal)


def _match(finder: Finder, layer: int, call: Attention) -> tuple[SiteNodes, Appended, Appended]:
    query, result = call.query, call.result
    if example(query).dim() != 4:
        raise unsupported("an attention that is not [batch, heads, tokens, size]", result, "keep heads on axis 1")
    keys, values = (_append(finder, result, query, side) for side in (call.key, call.value))
    if (keys.past is None) != (values.past is None):
        raise unsupported("keys are cached but values are not, or the reverse", result, "cache both")
    if keys.past is not None and call.is_causal:
        raise unsupported("is_causal=True over a filled cache", result, "pass a mask, or is_causal=False for one token")
    heads, kv_heads = (int(example(node).shape[1]) for node in (query, keys.new))
    for side in (keys, values):
        if not _repeats_heads(finder, side, heads // kv_heads):
            raise unsupported("keys or values change between cache and attention", result, "attend to them as cached")
    head_size, value_size = (int(example(node).shape[3]) for node in (query, values.new))
    site = Site(
        layer=layer,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        value_size=value_size,
        scale=float(call.scale) if call.scale is not None else 1.0 / math.sqrt(head_size),
        dtype=example(keys.new).dtype,
        past=None if keys.past is None or values.past is None else (keys.past, values.past),
        soft_cap=call.soft_cap,
        sinks=call.sinks is not None,
    )
    given = (call.mask, call.sides, call.products, call.sinks, call.spelled)
    return SiteNodes(site, result, query, keys.new, values.new, *given), keys, values


def _append(finder: Finder, call: Node, query: Node, used: Node) -> Appended:
    """From the tensor that attention reads back to the returned cache tensor, and to what that was made from."""
    node, repeats = used, list[Node]()
    while node not in finder.returned and _may_repeat(node):
        repeats.insert(0, node)
        [node] = node.all_input_nodes[:1]
    if node not in finder.returned:
        raise unsupported("attention over keys or values that are not returned", call, "call with use_cache=True")
    if node.target not in APPENDS:
        cached, fed = (concrete(example(n).shape[2], {}) for n in (node, query))
        if cached != fed:
            raise unsupported("a cache that is updated in place", node, CACHE)
        return Appended(node, node, None, tuple(repeats))
    parts, dim = node.args[0], node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or dim not in (-2, 2):
        raise unsupported("an append that is not cat([past, new], -2)", node, CACHE)
    past, new = parts
    assert isinstance(past, Node), f"{node.name} appends to a constant"
    assert isinstance(new, Node), f"{node.name} appends a constant"
    if past in finder.inputs and not is_weight(past):
        return Appended(node, new, finder.inputs[past], tuple(repeats))
    if example(past).numel() == 0:
        return Appended(node, new, None, tuple(repeats))
    raise unsupported("an append to something other than the cache", node, CACHE)


def _may_repeat(node: Node) -> bool:
    """Whether a call may stand between cache and attention: it moves numbers, or casts them to a wider type."""
    name, before = target_name(node), node.args[0] if node.args else None
    if not isinstance(before, Node) or name not in REPEATS:
        return False
    return name not in CASTS or example(before).dtype.itemsize <= example(node).dtype.itemsize


def _repeats_heads(finder: Finder, side: Appended, group: int) -> bool:
    """Whether attention reads each cached head `group` times in place, found by running the calls between.

    Every symbolic length stands for COLUMNS, so the run is small whatever the length of the cache.
    """
    if not side.repeats:
        return True
    shape = example(side.output).shape
    lengths = [example(node) for node in finder.inputs if isinstance(example(node), torch.SymInt)]
    env = {symbol: COLUMNS for length in lengths for symbol in length.node.expr.free_symbols}
    if isinstance(shape[0], torch.SymInt):
        env[shape[0].node.expr] = finder.program.batch
    sizes = [concrete(size, env) for size in shape]
    calls = [(node.target, *_arguments(node, env)) for node in side.repeats]
    text = f"{sizes} {group} {calls}"
    if text not in finder.proved:
        probe = torch.arange(math.prod(sizes)).view(sizes)
        value = probe
        for target, args, kwargs in calls:
            function = getattr(torch.Tensor, target) if isinstance(target, str) else target
            value = function(value, *args, **kwargs)
        expected = probe.repeat_interleave(group, dim=1)
        finder.proved[text] = torch.equal(value.to(probe.dtype).flatten(0, -3), expected.flatten(0, 1))
    return finder.proved[text]


def _arguments(node: Node, env: dict[Any, int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments after the first, with symbolic lengths as numbers."""

    def value(argument: Any) -> Any:
        return concrete(example(argument), env) if isinstance(argument, Node) else argument

    args: Any = torch.fx.node.map_aggregate(node.args[1:], value)
    kwargs: Any = torch.fx.node.map_aggregate(node.kwargs, value)
    return args, kwargs


def _classify_outputs(program: Program, returned: list[Any], cached: dict[Node, OutputRole]) -> list[OutputRole]:
    for value in returned:
        if not isinstance(value, Node) or not isinstance(example(value), torch.Tensor):
            raise unsupported("an output that is not a tensor", output_node(program.module), "return tensors only")
    outputs = [cached.get(value, OutputRole(Output.ROWS)) for value in returned]
    widths = {i: row_width(returned[i]) for i, role in enumerate(outputs) if role.kind is Output.ROWS}
    if not any(widths.values()):
        fix = "return the logits"
        raise unsupported("no logits [batch, tokens, vocabulary] among the outputs", output_node(program.module), fix)
    outputs[max(widths, key=widths.__getitem__)] = OutputRole(Output.LOGITS)
    return outputs
