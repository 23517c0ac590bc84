"""Find every (append to cache, attend) pair: a site. How models spell attention is known here, and in
`spelled_attention`, `latent_attention` and `flex_attention`.

    k = cat([past_k, k_new], -2)                 one Site:
    v = cat([past_v, v_new], -2)            ->     query q, key k_new, value v_new, mask, scale,
    o = scaled_dot_product_attention(q, k, v)      cached in inputs (past_k, past_v), returned as outputs (k, v)

K and V may reach the attention through a repetition over the query group (repeat_kv), which is checked by running it.
An empty cache (prefill) appends to nothing or to an empty tensor. A sliding layer returns the newest columns of the cat
alone, and attends to the whole of it; where it returns all (so that it can be cropped), it attends to the newest alone:

    full = cat([past_k, k_new], -2)                    full = cat([past_k, k_new], -2)
    return full[:, :, -n:], attend(q, full, ...)       return full, attend(q, full[:, :, -n:], ...)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from vericache_compile.errors import UnsupportedGraph
from vericache_compile.passes.evaluate import concrete
from vericache_compile.passes.find_writes import find_counters, find_write
from vericache_compile.passes.flex_attention import is_flex, read_flex
from vericache_compile.passes.latent_attention import find_expansion
from vericache_compile.passes.program import (
    Program,
    SiteNodes,
    ancestors,
    changed,
    example,
    expression,
    is_integer,
    is_weight,
    mutates,
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
    read: Node
    """What attention reads, before heads are repeated."""
    repeats: tuple[Node, ...]
    """Calls from there to the attention."""
    kept: int | None = None
    """Newest columns that `output` is cut to; None where it is not cut."""
    recent: int | None = None
    """Newest past columns that attention reads; None for all."""
    in_place: bool = False
    """Whether `output` is a buffer with room for every column, which is written in place."""


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
    if any(nodes.site.in_place for nodes in program.sites):
        _find_buffers(program)
    return len(program.sites)


def find_calls(program: Program) -> list[Attention]:
    """The attentions of a graph in order; raises UnsupportedGraph where there is none."""
    calls: list[Attention] = []
    for node in program.module.graph.nodes:
        if node.target is ATTENTION:
            calls.append(_read_call(node))
        elif is_flex(node):
            calls.append(read_flex(node))
        elif call_name(node) == "softmax" and (spelled := read_spelled(node)) is not None:
            calls.append(spelled)
    if not calls:
        raise _no_attention(program)
    return calls


def _find_buffers(program: Program) -> None:
    """Caches written in place and their counters, which Dynamo gives as it gives weights, get roles of their own."""
    roles, inputs = program.found_roles, program.placeholders
    if not all(nodes.site.in_place for nodes in program.sites):
        raise unsupported("caches of which some are updated in place", program.sites[0].attention, CACHE)
    if roles.tokens_per_call != 1 or any(nodes.site.past is None for nodes in program.sites):
        return
    writes = [write for node in program.cached if (write := find_write(node)) is not None]
    counters = find_counters(program, writes)
    changes = [change for change in counters.values() if change is not None]
    program.writes = [*(write.call for write in writes), *changes]
    own = {inputs.index(node) for node in (*program.cached, *counters)}
    program.roles = replace(
        roles,
        weights=tuple(i for i in roles.weights if i not in own),
        counters=tuple(map(inputs.index, counters)),
        counted=tuple(inputs.index(node) for node, change in counters.items() if change is not None),
    )


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
    made = find_expansion(finder.program, call, finder.proved)
    sides = (call.key, call.value) if made is None else (made.latent, made.rotated)
    keys, values = (_append(finder, result, query, side) for side in sides)
    if (keys.past is None) != (values.past is None):
        raise unsupported("keys are cached but values are not, or the reverse", result, "cache both")
    as_it_is = keys.in_place and (keys.past is None or finder.program.found_roles.tokens_per_call != 1)
    if keys.past is not None and call.is_causal and not as_it_is:
        raise unsupported("is_causal=True over a filled cache", result, "pass a mask, or is_causal=False for one token")
    heads, kv_heads = (int(example(node).shape[1]) for node in (query, keys.new))
    for side in (keys, values) if made is None else ():
        if not as_it_is and not _repeats_heads(finder, side, heads // kv_heads):
            raise unsupported("keys or values change between cache and attention", result, "attend to them as cached")
    if not as_it_is:
        _check_types(result, query, keys.new, values.new)
    size, value_size = (int(example(node).shape[3]) for node in (query, values.new))
    head_size = size
    if made is not None:  # all heads share one key, [latent, rotated part], and its value is the latent
        value_size = int(example(keys.new).shape[3])
        head_size = value_size + int(example(values.new).shape[3])
    if (keys.kept, keys.recent) != (values.kept, values.recent):
        raise unsupported("keys cut to other columns than values", result, "cut both alike")
    site = Site(
        layer=layer,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        value_size=value_size,
        scale=float(call.scale) if call.scale is not None else 1.0 / math.sqrt(size),
        dtype=example(keys.new).dtype,
        past=None if keys.past is None or values.past is None else (keys.past, values.past),
        soft_cap=call.soft_cap,
        sinks=call.sinks is not None,
        recent=keys.recent,
        kept=keys.kept,
        in_place=keys.in_place,
        latent=made is not None,
    )
    given = (call.mask, call.sides, call.products, call.sinks, call.spelled)
    own = () if made is None else (made.weight, made.calls)
    return SiteNodes(site, result, query, keys.new, values.new, *given, *own), keys, values


def _check_types(call: Node, *parts: Node) -> None:
    """Kernels take one type: that of the keys, which is also the queries' and holds all numbers of the values'."""
    query, key, value = (example(node).dtype for node in parts)
    if query is not key or torch.promote_types(key, value) is not key:
        names = [str(dtype).removeprefix("torch.") for dtype in (query, key, value)]
        found = "queries of {} over cached keys of {} and values of {}".format(*names)
        raise unsupported(found, call, "cache keys and values in the type of the queries")


def _append(finder: Finder, call: Node, query: Node, used: Node) -> Appended:
    """From the tensor that attention reads back to the returned cache tensor, and to what that was made from."""
    read, repeats, fed = used, list[Node](), example(query).shape[2]
    while read not in finder.returned and newest_columns(read) is None and (_may_repeat(read) or _is_write(read)):
        repeats = repeats if mutates(read) else [read, *repeats]
        [read] = read.all_input_nodes[:1]
    if (write := find_write(read)) is not None:
        return Appended(read, write.new, finder.inputs.get(read), read, tuple(repeats), in_place=True)
    node, recent = read, None
    if read not in finder.returned and (seen := newest_columns(read)) is not None:
        assert isinstance(read.args[0], Node), "newest columns are those of a call's result"
        node, recent = read.args[0], _as_number(seen - expression(fed))
    cuts = [user for user in node.users if user in finder.returned and newest_columns(user) is not None]
    if node not in finder.returned and (recent is not None or not cuts):
        raise _not_returned(finder, call, node)
    if node.target not in APPENDS:
        cached, fed = (concrete(size, {}) for size in (example(node).shape[2], fed))
        if cached != fed:
            raise unsupported("a cache that is updated in place", node, CACHE)
        return Appended(node, node, None, read, tuple(repeats), recent=recent)
    output = node if node in finder.returned else cuts[0]
    kept = _as_number(newest_columns(output)) if output is not node else None
    past, new = _parts(finder, node)
    return Appended(output, new, past, read, tuple(repeats), kept, recent if kept is None else kept)


def _not_returned(finder: Finder, call: Node, node: Node) -> UnsupportedGraph:
    """Why the keys or values that attention reads are none that the graph returns."""
    if any(found in finder.returned and found.target in APPENDS for found in ancestors([node])):
        found = "keys or values computed anew from what is cached, otherwise than of a latent by one weight"
        return unsupported(found, call, "run this model without vericache")
    return unsupported("attention over keys or values that are not returned", call, "call with use_cache=True")


def newest_columns(node: Node) -> Any:
    """n of a call x[:, :, -n:] or x[:, :, -n:, :], an int or an expression; None for any other."""
    index = node.args[1] if target_name(node) == "getitem" and len(node.args) > 1 else None
    if not isinstance(index, tuple) or len(index) not in (3, 4) or not isinstance(index[2], slice):
        return None
    first, cut = index[2].start, index[2] == slice(index[2].start, None, None)
    others = [part == slice(None) for i, part in enumerate(index) if i != 2]
    if isinstance(first, Node) and not is_integer(first):
        return None
    start = expression(example(first)) if isinstance(first, Node) else first
    counted = start is not None and (not isinstance(start, int) or start < 0)
    return -start if cut and all(others) and counted else None


def _as_number(columns: Any) -> int | None:
    """A count of columns as an int; refuses one that varies."""
    if columns is None or isinstance(columns, int) or columns.is_number:
        return None if columns is None else int(columns)
    raise UnsupportedGraph(
        f"a cache cut to {columns} columns", "the captured graph", "keep as many columns whatever the call"
    )


def _parts(finder: Finder, node: Node) -> tuple[int | None, Node]:
    """The cached input (None while it is empty) and the new part that a cat appends to it."""
    parts, dim = node.args[0], node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or dim not in (-2, 2):
        raise unsupported("an append that is not cat([past, new], -2)", node, CACHE)
    past, new = parts
    assert isinstance(past, Node), f"{node.name} appends to a constant"
    assert isinstance(new, Node), f"{node.name} appends a constant"
    if past in finder.inputs and not is_weight(past):
        return finder.inputs[past], new
    if example(past).numel() == 0:
        return None, new
    raise unsupported("an append to something other than the cache", node, CACHE)


def _may_repeat(node: Node) -> bool:
    """Whether a call may stand between cache and attention: it moves numbers, or casts them to a wider type."""
    name, before = target_name(node), node.args[0] if node.args else None
    if not isinstance(before, Node) or name not in REPEATS:
        return False
    return name not in CASTS or example(before).dtype.itemsize <= example(node).dtype.itemsize


def _is_write(node: Node) -> bool:
    """Whether a call writes columns of a buffer in place, and stands for that buffer from there on."""
    buffer = changed(node) if mutates(node) else None
    return isinstance(buffer, Node) and (write := find_write(buffer)) is not None and write.call is node


def _repeats_heads(finder: Finder, side: Appended, group: int) -> bool:
    """Whether attention reads each cached head `group` times in place, found by running the calls between.

    Every symbolic length stands for COLUMNS, so the run is small whatever the length of the cache.
    """
    if not side.repeats:
        return True
    shape = example(side.read).shape
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
    outputs = [cached.get(value) or _as_count(program, value) or OutputRole(Output.ROWS) for value in returned]
    for value, role in zip(returned, outputs, strict=True):
        is_tensor = isinstance(value, Node) and isinstance(example(value), torch.Tensor)
        if not is_tensor and role.kind not in (Output.LENGTH, Output.BATCH):
            raise unsupported("an output that is not a tensor", output_node(program.module), "return tensors only")
    widths = {i: row_width(returned[i]) for i, role in enumerate(outputs) if role.kind is Output.ROWS}
    if not any(widths.values()):
        fix = "return the logits"
        raise unsupported("no logits [batch, tokens, vocabulary] among the outputs", output_node(program.module), fix)
    outputs[max(widths, key=widths.__getitem__)] = OutputRole(Output.LOGITS)
    return outputs


def _as_count(program: Program, value: Any) -> OutputRole | None:
    """The role of a returned integer that is a past length grown by this call's tokens, or the batch; None for anything
    else."""
    if not isinstance(value, Node) or not is_integer(value):
        return None
    inputs, made = program.placeholders, set(ancestors([value]))
    batch, fed = map(expression, example(inputs[program.found_roles.tokens]).shape)
    if expression(example(value)) == fed and all(nodes.site.past is None for nodes in program.sites):
        return OutputRole(Output.LENGTH)
    if expression(example(value)) == batch:
        return OutputRole(Output.BATCH)
    source = next((i for i in program.found_roles.lengths if inputs[i] in made), None)
    return None if source is None else OutputRole(Output.LENGTH, source=source)
